"""The training step: one program, the same numbers with any sharding, and no cost for frozen parameters."""

import concurrent.futures
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from networks import random_network, tiny_on_small_images

from vllama_jax import sharding
from vllama_jax.config import LoraConfig
from vllama_jax.data import pipeline
from vllama_jax.data.config import DataConfig, DatasetConfig
from vllama_jax.errors import ConfigError
from vllama_jax.nn.lora import add_lora
from vllama_jax.train.config import AUDIO_BRANCH, LORA, VISION_BRANCH, OptimConfig, TrainConfig
from vllama_jax.train.optim import make_optimizer
from vllama_jax.train.state import AbstractModel, init_state, make_abstract_state, select_paths
from vllama_jax.train.step import make_step

SLOW = pytest.mark.slow
ROWS, LENGTH = 8, 48
OPTIM = OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=0)


def config_of(**options) -> TrainConfig:
    fields = {"model": "m", "datasets": (DatasetConfig(path="d"),), "steps": 10, "batch_size": ROWS, "optim": OPTIM}
    return TrainConfig(**{**fields, "dropout": 0.0, **options})


def batch_of(branch: str, seed: int = 0, *, images: bool = False) -> dict[str, np.ndarray]:
    """Return features of one frame or an image, media tokens first, and random text with labels at its beginning."""
    rng = np.random.default_rng(seed)
    many = 32 if branch == "vision" else 8
    most = LENGTH - many
    labels = rng.integers(1, most, ROWS)
    columns = np.arange(most)
    media = {"features": rng.standard_normal((ROWS, 1, 32, 48), np.float32)}
    if images:
        media = {"frames": rng.integers(0, 256, (ROWS, 1, 56, 56, 3)).astype(np.uint8)}
    return {
        **media,
        "ids": rng.integers(3, 500, (ROWS, LENGTH)).astype(np.int32),
        "is_media": np.broadcast_to((np.arange(LENGTH) >= 1) & (np.arange(LENGTH) <= many), (ROWS, LENGTH)).copy(),
        "length": np.full(ROWS, LENGTH, np.int32),
        "positions": np.where(columns < labels[:, None], many + columns, 0).astype(np.int32),
        "targets": np.where(columns < labels[:, None], rng.integers(3, 500, (ROWS, most)), -1).astype(np.int32),
    }


class Trainer:
    """A state on a mesh with the compiled step."""

    def __init__(self, config: TrainConfig, shape=(1, 1, 1)):
        network = random_network(tiny_on_small_images())
        add_lora(network.llama, config.lora, rngs=nnx.Rngs(0))
        self.mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        self.abstract_model = AbstractModel(network)
        values = {path: jnp.asarray(variable.get_value()) for path, variable in self.abstract_model.variables.items()}
        self.trainable_paths = select_paths(list(values), config.trainable)
        weight_shardings = self.abstract_model.shardings(values, self.mesh)
        optimizer = make_optimizer(config.optim, config.steps)
        weights = {path: weight_shardings[path] for path in self.trainable_paths}
        self.abstract_state = make_abstract_state(weights, self.abstract_model, optimizer, self.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        self._start = jax.jit(lambda weights: init_state(weights, optimizer), out_shardings=shardings)
        self._initial = {path: jax.device_put(values[path], weight_shardings[path]) for path in self.trainable_paths}
        self.restart()
        self.frozen = {
            path: jax.device_put(value, weight_shardings[path])
            for path, value in values.items()
            if path not in self.trainable_paths
        }
        replicated = NamedSharding(self.mesh, PartitionSpec())
        self.step = jax.jit(
            make_step(config, self.abstract_model, optimizer), donate_argnums=0, out_shardings=(shardings, replicated)
        )
        self.rows = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))

    def restart(self) -> None:
        """Restore the state before the first step."""
        with sharding.use_mesh(self.mesh):
            self.state = self._start(self._initial)

    def __call__(self, batch) -> dict[str, float]:
        with sharding.use_mesh(self.mesh):
            placed = {name: jax.device_put(value, self.rows) for name, value in batch.items()}
            self.state, metrics = self.step(self.state, self.frozen, placed)
        return {name: float(value) for name, value in metrics.items()}


@functools.cache
def _shared_trainer() -> Trainer:
    return Trainer(config_of())


@pytest.fixture
def trainer() -> Trainer:
    """A trainer of `config_of()` on one device before its first step, compiled once for all tests."""
    shared = _shared_trainer()
    shared.restart()
    return shared


def losses(trainer: Trainer, branch: str, count: int, **options) -> list[float]:
    return [trainer(batch_of(branch, seed, **options))["loss"] for seed in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("branch", ["vision", pytest.param("audio", marks=SLOW)])
def test_eight_devices_give_the_losses_of_one_and_compile_once(branch):
    trainable = VISION_BRANCH if branch == "vision" else AUDIO_BRANCH
    config = config_of(branch=branch, trainable=trainable)
    alone, split = Trainer(config), Trainer(config, (2, 2, 2))
    together = losses(split, branch, 10, images=True)
    np.testing.assert_allclose(together, losses(alone, branch, 10, images=True), rtol=1e-5)
    for trainer in (alone, split):
        assert trainer.step._cache_size() == 1
    for leaf, planned in zip(jax.tree.leaves(split.state), jax.tree.leaves(split.abstract_state), strict=True):
        assert leaf.sharding == planned.sharding
    queries = "video_qformer/queries" if branch == "vision" else "audio_qformer/queries"
    opt_state = next(item for item in split.state.opt_state if isinstance(item, optax.ScaleByAdamState))
    assert opt_state.mu[queries].sharding.spec == PartitionSpec(None, ("fsdp",))


@SLOW
def test_gradient_accumulation_equals_one_batch(trainer):
    accumulated = Trainer(config_of(grad_accum_steps=4))
    for seed in range(3):
        one, other = trainer(batch_of("vision", seed)), accumulated(batch_of("vision", seed))
        for name in ("loss", "gradient_norm", "tokens"):
            assert other[name] == pytest.approx(one[name], rel=1e-5)


@SLOW
@pytest.mark.parametrize("remat_policy", ["dots", "none"])
def test_remat_policies_do_not_change_losses(trainer, remat_policy):
    stored = Trainer(config_of(remat_policy=remat_policy))
    one, other = trainer(batch_of("vision")), stored(batch_of("vision"))
    assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-5)


@pytest.mark.slow
def test_a_row_without_labels_changes_nothing(trainer):
    batch, other = batch_of("vision"), batch_of("vision")
    for which in (batch, other):
        which["targets"][3] = -1
    other["features"][3] = 0
    metrics = trainer(batch)
    trainer.restart()
    assert trainer(other) == metrics


@pytest.mark.slow
def test_a_batch_without_any_label_gives_zero(trainer):
    batch = batch_of("vision")
    batch["targets"][:] = -1
    metrics = trainer(batch)
    assert metrics["loss"] == 0
    assert metrics["gradient_norm"] == 0
    assert metrics["tokens"] == 0


@pytest.mark.slow
def test_accumulated_sums_are_divided_once():
    """One program processes a batch of two micro-batches, and the same batch with labels in only one of them."""
    still = dataclasses.replace(OPTIM, lr=0.0, min_lr=0.0, weight_decay=0.0)
    trainer, before, found = Trainer(config_of(grad_accum_steps=2, optim=still)), None, []
    for micro_batch in (None, 0, 1):
        batch = batch_of("vision")
        if micro_batch is not None:
            batch["targets"][1 - micro_batch :: 2] = -1  # rows alternate between micro-batches
        metrics = trainer(batch)
        assert metrics["tokens"] == (batch["targets"] >= 0).sum()
        adam = next(item for item in trainer.state.opt_state if isinstance(item, optax.ScaleByAdamState))
        mean = {path: np.asarray(value) for path, value in adam.mu.items()}
        gradients = {path: (value - OPTIM.beta1 * (before[path] if before else 0)) for path, value in mean.items()}
        before = mean
        sums = {"loss": np.float32(metrics["loss"]), **gradients}
        found.append({name: value * metrics["tokens"] for name, value in sums.items()})
    full, one, other = found
    for name, value in full.items():
        np.testing.assert_allclose(one[name] + other[name], value, rtol=1e-3, atol=1e-4 * np.abs(value).max())


@pytest.mark.slow
def test_dropout_differs_between_rows_layers_and_micro_batches(monkeypatch):
    masks, sample = [], jax.random.bernoulli

    def bernoulli(*arguments):
        mask = sample(*arguments)
        jax.debug.callback(lambda drawn: masks.append(np.asarray(drawn)), mask)
        return mask

    monkeypatch.setattr(jax.random, "bernoulli", bernoulli)
    micro_batches, cfg = 2, tiny_on_small_images().video_qformer
    Trainer(config_of(dropout=0.5, grad_accum_steps=micro_batches))(batch_of("vision"))
    jax.effects_barrier()
    shapes = {  # number of masks by shape: layers and queries
        (ROWS // micro_batches, cfg.num_queries, cfg.width): 3 * cfg.depth + 1,  # outputs of two attentions and the MLP
        (ROWS // micro_batches, cfg.num_heads, 1, cfg.num_queries, cfg.num_queries): 2
        * cfg.depth,  # weights of one frame
    }
    assert {mask.shape for mask in masks} == set(shapes)
    for shape, num_shards in shapes.items():  # the backward pass draws each mask again
        assert len({mask.tobytes() for mask in masks if mask.shape == shape}) == num_shards * micro_batches, shape
    assert np.mean([mask.mean() for mask in masks]) == pytest.approx(0.5, abs=0.02)


@SLOW
def test_dropout_differs_from_step_to_step_and_not_from_run_to_run():
    config = config_of(dropout=0.1, optim=dataclasses.replace(OPTIM, lr=0.0, min_lr=0.0, weight_decay=0.0))
    one, other = Trainer(config), Trainer(config)
    first = [one(batch_of("vision"))["loss"] for _ in range(3)]
    assert first == [other(batch_of("vision"))["loss"] for _ in range(3)]
    assert len(set(first)) == 3


@SLOW
def test_dropout_does_not_depend_on_the_mesh():
    config = config_of(dropout=0.1)
    alone, split = Trainer(config), Trainer(config, (2, 2, 1))
    np.testing.assert_allclose(losses(split, "vision", 2), losses(alone, "vision", 2), rtol=1e-5)


@SLOW
def test_gradients_are_clipped_to_a_norm_when_asked(trainer):
    """Adam's updates are invariant to scale; its second moment is not."""
    free, clipped = trainer, Trainer(config_of(optim=dataclasses.replace(OPTIM, max_grad_norm=1e-3)))
    norm = free(batch_of("vision"))["gradient_norm"]
    assert clipped(batch_of("vision"))["gradient_norm"] == pytest.approx(norm, rel=1e-6)

    def mean_square(one):
        adam = next(item for item in jax.tree.leaves(one.state.opt_state, is_leaf=lambda x: hasattr(x, "nu")))
        return sum(float(jnp.sum(leaf)) for leaf in adam.nu.values())

    assert mean_square(clipped) / mean_square(free) == pytest.approx((1e-3 / norm) ** 2, rel=1e-4)


@pytest.mark.slow
def test_only_trainable_parameters_have_state_and_change(trainer):
    assert all(re.match("video_qformer/|frame_positions|llama_proj/", path) for path in trainer.trainable_paths)
    frozen = {path: np.asarray(value).copy() for path, value in trainer.frozen.items()}
    before = {path: np.asarray(value).copy() for path, value in trainer.state.weights.items()}
    trainer(batch_of("vision"))
    trainer(batch_of("vision"))
    for path, value in frozen.items():
        np.testing.assert_array_equal(trainer.frozen[path], value)
    for path, value in before.items():
        assert not np.array_equal(trainer.state.weights[path], value), path
    learned = sum(value.size for value in before.values())
    state = sum(leaf.size for leaf in jax.tree.leaves(trainer.state))
    assert state <= 3 * learned + 4, "weights, two moments, and a few counters"


@SLOW
def test_lora_updates_are_trained_and_the_language_model_is_not():
    config = config_of(lora=LoraConfig(rank=2), trainable=(*VISION_BRANCH, *LORA))
    trainer = Trainer(config, (2, 2, 2))
    kernel = "llama/blocks/attention/query/kernel"
    before = np.asarray(trainer.frozen[kernel]).copy()
    up = trainer.state.weights["llama/blocks/attention/query/lora/up"]
    assert not np.asarray(up).any()
    first = losses(trainer, "vision", 3)
    np.testing.assert_allclose(first, losses(Trainer(config), "vision", 3), rtol=1e-5)
    assert np.asarray(trainer.state.weights["llama/blocks/attention/query/lora/up"]).any()
    np.testing.assert_array_equal(trainer.frozen[kernel], before)


@pytest.mark.parametrize(("processes", "threads"), [(0, 8), (4, 2), (16, 1)])
def test_processes_divide_the_threads(processes, threads, monkeypatch):
    asked = []
    monkeypatch.setattr(
        pipeline, "_thread_pool", lambda count: asked.append(count) or concurrent.futures.ThreadPoolExecutor(1)
    )
    config = config_of(data=DataConfig(num_threads=8, num_workers=processes))
    assert (
        pipeline.BatchReader(
            config.data, config.branch, config.seed, tiny_on_small_images(), None, None, range(ROWS)
        ).decode_all(None, [])
        == []
    )
    assert asked == [threads]


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(
        ConfigError, match=r"trainable pattern 'video_qfromer/\*' matches no parameter .* video_qformer"
    ):
        select_paths(["video_qformer/queries", "vit/positions"], ["video_qfromer/*"])
