"""The training step, a pure function of (state, frozen parameters, batch), and the loss.

The loss is the mean over all labeled tokens of the global batch (reference: modeling_llama.py:695). Sums are therefore
accumulated over micro-batches and divided once.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vllama_jax.branches import BRANCHES
from vllama_jax.media.image import standardize
from vllama_jax.nn.dropout import Dropout
from vllama_jax.nn.layers import constrain_sharding
from vllama_jax.nn.video_llama import VideoLlama, splice
from vllama_jax.runtime.xla_options import compiler_options
from vllama_jax.towers import get_tower
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.optim import ScheduledOptimizer
from vllama_jax.train.state import AbstractModel, TrainState, Weights

# A batch of b rows, with one of the first three arrays. n: padded length of sequences; m: padded number of labels.
#   frames     uint8 [b, t, h, w, 3]      frames of videos, or images
#   mel        float32 [b, s, 128, 204]   log-mel spectrograms
#   features   [b, t, q, d] or [b, s, e]  outputs of `run_encoders`, from a feature cache
#   ids        int32 [b, n]               token ids; 0 at placeholders and padding
#   is_media   bool [b, n]                placeholders of media tokens
#   length     int32 [b]                  number of tokens before padding
#   positions  int32 [b, m]               positions whose next token has a label
#   targets    int32 [b, m]               these labels; -1 for padding
Batch = Mapping[str, Array]
Metrics = dict[str, Array]
Optimizer: TypeAlias = optax.GradientTransformation | ScheduledOptimizer
# A loss function: (network, batch, config, dropout) → (sum, count). Both are added up over the micro-batches of a
# global batch and then divided. `dropout` is None in validation.
Loss = Callable[[VideoLlama, Batch, TrainConfig, Dropout | None], tuple[Array, Array]]


def compute_dtype(config: TrainConfig) -> jnp.dtype:
    """Return the dtype of a run's frozen parameters and matrix products, with "auto" resolved."""
    if config.compute_dtype == "auto":
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return jnp.dtype(config.compute_dtype)


def run_encoders(network: VideoLlama, branch: str, batch: Batch) -> Array:
    """Run a branch's frozen encoder on the media of a batch, or return its precomputed features.

    Args:
        network: The network.
        branch: The name of the branch.
        batch: A batch with "frames", "mel" or "features".

    Returns:
        The features, [b, t or s, *feature_shape].
    """
    if "features" in batch:
        return batch["features"]
    encoders = BRANCHES[branch].encoders
    if "mel" in batch:
        return encoders["mel"].encode(network, batch["mel"])
    tower = get_tower(BRANCHES[branch].frame_tower_config(network.cfg))
    frames = standardize(batch["frames"].astype(jnp.float32), tower.mean, tower.std)
    return encoders["frames"].encode(network, constrain_sharding(frames, "batch", None, None, None, None))


def loss_sum(
    network: VideoLlama, batch: Batch, config: TrainConfig, dropout: Dropout | None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Compute the cross-entropy of a batch, the default loss of a run.

    Args:
        network: The network. The layers of its language model may be stacked or not.
        batch: The arrays that `Batch` lists.
        config: The run config, of which `branch` and `remat_policy` are used.
        dropout: Dropout of the trainable Q-Former. None for none.

    Returns:
        The sum over all labeled tokens, float32 [], and the number of these tokens, int32 [].
    """
    features = run_encoders(network, config.branch, batch)
    media = BRANCHES[config.branch].tokens(network, features, dropout=dropout)
    embeddings = splice(network.embed(batch["ids"]), batch["is_media"], media)
    mask = jnp.arange(embeddings.shape[1]) < batch["length"][:, None]
    hidden = network.llama(constrain_sharding(embeddings, "batch", None, None), mask, config.remat_policy)
    hidden = jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1)
    logits = constrain_sharding(network.llama.logits(hidden), "batch", None, "vocab")
    has_label = batch["targets"] >= 0
    is_target = (
        jnp.arange(logits.shape[-1]) == batch["targets"][..., None]
    )  # avoids a gather over the sharded vocabulary
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return jnp.sum(jnp.where(has_label, losses, 0)), jnp.sum(has_label)


def make_step(
    config: TrainConfig, abstract_model: AbstractModel, optimizer: Optimizer, loss: Loss | None = None
) -> Callable[[TrainState, Weights, Batch], tuple[TrainState, Metrics]]:
    """Make the training step. The caller compiles it, as `jit_step` does.

    Args:
        config: The run config.
        abstract_model: The network without values.
        optimizer: The optimizer of the trainable parameters, a dict by path. Metrics include "lr" if it is a
            `ScheduledOptimizer`.
        loss: The loss function (see `Loss`). The default is `loss_sum`.

    Returns:
        A function (state, frozen parameters, batch) → (new state, metrics). The metrics are "loss", "gradient_norm",
        "tokens" (the number of labels) and possibly "lr".
    """
    loss = loss or loss_sum
    dtype = compute_dtype(config)

    def compute_loss_sum(weights: Weights, frozen: Weights, batch: Batch, key: Array) -> tuple[Array, Array]:
        cast = {path: weight.astype(dtype) for path, weight in weights.items()}
        dropout = Dropout(key, config.dropout) if config.dropout else None
        return loss(abstract_model.build({**frozen, **cast}), batch, config, dropout)

    def step(state: TrainState, frozen: Weights, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradient = jax.value_and_grad(compute_loss_sum, has_aux=True)
        micro_batches = jax.tree.map(lambda x: _split_micro_batches(x, config.grad_accum_steps), batch)

        def accumulate(sums: Any, micro_batch: tuple[Batch, Array]) -> tuple[Any, None]:
            (total, count), gradients = gradient(state.weights, frozen, *micro_batch)
            return jax.tree.map(jnp.add, sums, (total, count, gradients)), None

        zero = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, state.weights))
        keys = jax.random.split(key, config.grad_accum_steps)
        if config.grad_accum_steps == 1:
            total, count, gradients = accumulate(zero, jax.tree.map(lambda x: x[0], (micro_batches, keys)))[0]
        else:
            total, count, gradients = jax.lax.scan(accumulate, zero, (micro_batches, keys))[0]
        tokens = jnp.maximum(count, 1)
        gradients = jax.tree.map(lambda gradient: gradient / tokens, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.weights)
        metrics = {
            "loss": total / tokens,
            "gradient_norm": optax.tree.norm(gradients),
            "tokens": count,
        }
        if isinstance(optimizer, ScheduledOptimizer):
            metrics["lr"] = optimizer.learning_rate(state.step)
        return TrainState(state.step + 1, optax.apply_updates(state.weights, updates), opt_state), metrics

    return step


def jit_step(step: Callable[..., tuple[TrainState, Metrics]], state: TrainState) -> Any:
    """Wrap a step in `jax.jit`. The input state is donated, and the output state has the same shardings.

    Args:
        step: The function that `make_step` returns.
        state: The abstract state, for its shardings, whose devices are those that the step is compiled for.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    platform = next(iter(shardings.step.device_set)).platform
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, shardings.step),
        compiler_options=compiler_options(platform, "train_step"),
    )


def make_eval_step(
    config: TrainConfig, abstract_model: AbstractModel, loss: Loss | None = None
) -> Callable[[Weights, Weights, Batch], tuple[Float[Array, ""], Int[Array, ""]]]:
    """Make the validation step, without dropout and gradients.

    Args:
        config: The run config.
        abstract_model: The network without values.
        loss: The loss function, as for `make_step`.

    Returns:
        A function (trainable parameters, frozen parameters, batch) → (sum of the loss, number of labels).
    """
    loss = loss or loss_sum
    dtype = compute_dtype(config)

    def evaluate(weights: Weights, frozen: Weights, batch: Batch) -> tuple[Array, Array]:
        cast = {path: weight.astype(dtype) for path, weight in weights.items()}
        return loss(abstract_model.build({**frozen, **cast}), batch, config, None)

    return evaluate


def _split_micro_batches(x: Array, count: int) -> Array:
    """Reshape [b, …] to [count, b / count, …]. Each micro-batch has rows of every device."""
    micro_batches = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return constrain_sharding(micro_batches, None, "batch", *(None,) * (x.ndim - 1))
