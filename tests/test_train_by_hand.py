"""The training step of a network with one matrix, compared with computation by hand.

Loss, gradient, micro-batches, metrics, random keys and dtypes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vllama_jax.data.config import DatasetConfig
from vllama_jax.nn.dropout import Dropout, apply_dropout
from vllama_jax.train.config import OptimConfig, TrainConfig
from vllama_jax.train.optim import learning_rate, make_optimizer
from vllama_jax.train.state import init_state
from vllama_jax.train.step import loss_sum, make_eval_step, make_step

ROWS, LENGTH, WIDTH, VOCABULARY, MEDIA = 4, 6, 5, 7, 2
STEPS = 8
OPTIM = OptimConfig(lr=0.1, min_lr=0.01, warmup_lr=0.02, warmup_steps=3)


class Network:
    """A network with one-hot embeddings; media tokens are the features; the language model returns its input."""

    def __init__(self, head, observed: list):
        self.head, self.observed, self.llama = head, observed, self

    def video_tokens(self, features, *, dropout):
        self.observed.append(dropout)
        return apply_dropout(features, dropout)

    def embed(self, ids):
        return jax.nn.one_hot(ids, WIDTH)

    def __call__(self, embeddings, mask, remat_policy):
        return embeddings * mask[..., None]

    def logits(self, hidden):
        return (hidden.astype(self.head.dtype) @ self.head).astype(jnp.float32)


@dataclasses.dataclass
class AbstractModel:
    """Builds the network, and records the arguments of its calls."""

    built: list = dataclasses.field(default_factory=list)
    observed: list = dataclasses.field(default_factory=list)

    def build(self, weights):
        self.built.append({path: weight.dtype.name for path, weight in weights.items()})
        return Network(weights["head"], self.observed)


def config_of(**options) -> TrainConfig:
    fields = {"model": "m", "datasets": (DatasetConfig(path="d"),), "steps": STEPS, "batch_size": ROWS, "optim": OPTIM}
    return TrainConfig(**{**fields, "dropout": 0.0, "compute_dtype": "float32", **options})


def batch_of() -> dict[str, np.ndarray]:
    """Return rows with 3, 1, 0 and 2 labels, one of which is token 0. The second and third tokens are media."""
    rng = np.random.default_rng(0)
    targets = np.array([[3, 0, 6], [1, -1, -1], [-1, -1, -1], [2, 5, -1]], np.int32)
    return {
        "features": rng.standard_normal((ROWS, MEDIA, WIDTH)).astype(np.float32),
        "ids": rng.integers(0, WIDTH, (ROWS, LENGTH)).astype(np.int32),
        "is_media": np.broadcast_to(np.isin(np.arange(LENGTH), [1, 2]), (ROWS, LENGTH)),
        "length": np.array([6, 4, 6, 5], np.int32),
        "positions": np.where(targets >= 0, [[2, 3, 4]], 0).astype(np.int32),
        "targets": targets,
    }


def head_of() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((WIDTH, VOCABULARY))


def reference_loss(head: np.ndarray, rows: list[int]) -> tuple[float, int, np.ndarray]:
    """Sum the labels' cross-entropy in float64; return the sum, the number of labels and the gradient."""
    batch, loss, count, gradient = batch_of(), 0.0, 0, np.zeros_like(head)
    for row in rows:
        hidden = np.eye(WIDTH)[batch["ids"][row]]
        hidden[1], hidden[2] = batch["features"][row]
        for position, target in zip(batch["positions"][row], batch["targets"][row], strict=True):
            if target >= 0:
                logits = hidden[position] @ head
                probabilities = np.exp(logits) / np.exp(logits).sum()
                loss -= np.log(probabilities[target])
                gradient += np.outer(hidden[position], probabilities - np.eye(VOCABULARY)[target])
                count += 1
    return loss, count, gradient


def run(
    config: TrainConfig, *, steps: int = 1, again: int = 0, abstract_model: AbstractModel | None = None, batch=None
):
    """Return the state after some steps on one batch, and the metrics; `again` restarts from the beginning."""
    optimizer = make_optimizer(config.optim, STEPS)
    step = jax.jit(make_step(config, abstract_model or AbstractModel(), optimizer))
    frozen, metrics = {"other": jnp.zeros(1, config.compute_dtype)}, []
    for _ in range(1 + again):
        state = init_state({"head": jnp.float32(head_of())}, optimizer)
        for _ in range(steps):
            state, found = step(state, frozen, batch or batch_of())
            metrics.append({name: float(value) for name, value in found.items()})
    return state, metrics


@pytest.mark.slow
def test_the_loss_sums_over_labels_including_token_0():
    loss, count = loss_sum(Network(jnp.float32(head_of()), []), batch_of(), config_of(), None)
    expected, number, _ = reference_loss(head_of(), [0, 1, 2, 3])
    assert (float(loss), int(count)) == (pytest.approx(expected, rel=1e-5), number)
    assert number == 6


@pytest.mark.slow
@pytest.mark.parametrize("grad_accum_steps", [1, 2, 4])
def test_loss_and_gradient_do_not_depend_on_accumulation_steps(grad_accum_steps):
    """One micro-batch has more labels than another, and one has none, so a mean of their means would differ."""
    state, (metrics,) = run(config_of(grad_accum_steps=grad_accum_steps))
    loss, count, gradient = reference_loss(head_of(), [0, 1, 2, 3])
    assert metrics["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(np.linalg.norm(gradient) / count, rel=1e-5)
    assert metrics["tokens"] == count
    adam = next(item for item in state.opt_state if isinstance(item, optax.ScaleByAdamState))
    np.testing.assert_allclose(adam.mu["head"], 0.1 * gradient / count, rtol=1e-4, atol=1e-7)


def test_the_reported_gradient_norm_is_before_clipping():
    _, (metrics,) = run(config_of(optim=dataclasses.replace(OPTIM, max_grad_norm=1e-3)))
    _, count, gradient = reference_loss(head_of(), [0, 1, 2, 3])
    assert metrics["gradient_norm"] == pytest.approx(np.linalg.norm(gradient) / count, rel=1e-5)


def test_metrics_have_the_learning_rate_of_their_step():
    state, metrics = run(config_of(), steps=5)
    assert int(state.step) == 5
    assert [one["lr"] for one in metrics] == pytest.approx([float(learning_rate(OPTIM, STEPS, n)) for n in range(5)])


FIXED = dataclasses.replace(OPTIM, lr=0.0, min_lr=0.0, warmup_lr=0.0)


@pytest.mark.slow
def test_dropout_masks_depend_on_step_and_seed():
    config = config_of(dropout=0.5, optim=FIXED)
    losses = [one["loss"] for one in run(config, steps=3, again=1)[1]]
    assert losses[:3] == losses[3:]
    losses += [one["loss"] for one in run(dataclasses.replace(config, seed=7))[1]]
    assert len(set(losses)) == 4


@pytest.mark.slow
def test_micro_batches_have_their_own_dropout_masks(monkeypatch):
    """The media tokens of two micro-batches are 1 and -1: with one shared mask, their sums would be opposite."""

    def kept(network, batch, config, dropout):
        found = network.video_tokens(batch["features"], dropout=dropout)
        return jnp.sum(found) + 0 * jnp.sum(network.head), jnp.int32(1)

    monkeypatch.setattr("vllama_jax.train.step.loss_sum", kept)
    signs = np.array([1, -1, 1, -1], np.float32)[:, None, None] * np.ones((ROWS, 40, 40), np.float32)
    _, (metrics,) = run(config_of(dropout=0.5, grad_accum_steps=2), batch={**batch_of(), "features": signs})
    assert abs(metrics["loss"]) > 1


def test_validation_uses_no_dropout():
    abstract_model = AbstractModel()
    evaluate = make_eval_step(config_of(dropout=0.9), abstract_model)
    loss, count = evaluate({"head": jnp.float32(head_of())}, {}, batch_of())
    expected, number, _ = reference_loss(head_of(), [0, 1, 2, 3])
    assert (float(loss), int(count)) == (pytest.approx(expected, rel=1e-5), number)
    assert abstract_model.observed == [None]


@pytest.mark.slow
def test_computation_is_in_the_compute_dtype_and_state_in_float32():
    abstract_model = AbstractModel()
    state, _ = run(config_of(compute_dtype="bfloat16"), abstract_model=abstract_model)
    assert abstract_model.built[0] == {"other": "bfloat16", "head": "bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    make_eval_step(config_of(compute_dtype="bfloat16"), abstract_model)(
        {"head": jnp.float32(head_of())}, {}, batch_of()
    )
    assert abstract_model.built[-1]["head"] == "bfloat16"


@pytest.mark.slow
def test_the_dropout_rate_is_passed_to_the_network():
    abstract_model = AbstractModel()
    run(config_of(dropout=0.25), abstract_model=abstract_model)
    assert [one.rate for one in abstract_model.observed if isinstance(one, Dropout)] == [0.25]
    abstract_model = AbstractModel()
    run(config_of(), abstract_model=abstract_model)
    assert abstract_model.observed == [None]
