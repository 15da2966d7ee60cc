"""The optimizer: AdamW with the original's learning rate schedule (reference: optims.py, runner_base.py)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vllama_jax.train.config import OptimConfig


def learning_rate(cfg: OptimConfig, steps: int, step: jax.Array | int) -> jax.Array:
    """Compute the learning rate of a step: a linear warm-up, then a cosine that starts at step 0.

    The original computes the warm-up from the step within an epoch. The two are equal if the warm-up is not longer than
    an epoch, as in all of the original's configs.

    Args:
        cfg: The optimizer config.
        steps: Number of steps of the run, where the cosine ends.
        step: Number of updates done before, from 0.

    Returns:
        The learning rate, float [].
    """
    warmup = cfg.warmup_lr + (cfg.lr - cfg.warmup_lr) * step / max(cfg.warmup_steps, 1)
    cosine = cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))
    return jnp.where(step < cfg.warmup_steps, warmup, cosine)


class ScheduledOptimizer(NamedTuple):
    """An optax optimizer with its learning rate schedule. The metrics of a run include its learning rate.

    Attributes:
        init: `init` of `optax.GradientTransformation`.
        update: `update` of `optax.GradientTransformation`.
        learning_rate: A function from the number of updates done to the learning rate of the next one.
    """

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    learning_rate: Callable[[jax.Array | int], jax.Array]


def make_optimizer(cfg: OptimConfig, steps: int) -> ScheduledOptimizer:
    """Make the AdamW optimizer of a run. Weight decay does not apply to biases and scales of norms.

    Args:
        cfg: The optimizer config.
        steps: Number of steps of the run, where the cosine of the learning rate ends.

    Returns:
        An optimizer of the trainable parameters, a dict by path. Frozen parameters have no optimizer state.
    """

    def schedule(step: jax.Array | int) -> jax.Array:
        return learning_rate(cfg, steps, step)

    clip = [optax.clip_by_global_norm(cfg.max_grad_norm)] if cfg.max_grad_norm else []
    adam = optax.chain(
        *clip,
        optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps),
        optax.add_decayed_weights(
            cfg.weight_decay, mask=lambda weights: {path: has_weight_decay(path) for path in weights}
        ),
        optax.scale_by_learning_rate(schedule),
    )
    return ScheduledOptimizer(adam.init, adam.update, schedule)


def has_weight_decay(path: str) -> bool:
    """Return whether weight decay applies to the parameter at `path`: to all except biases and scales of norms."""
    return path.rsplit("/", 1)[-1] not in ("bias", "scale")
