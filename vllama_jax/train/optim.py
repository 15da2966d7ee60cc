"""The optimizer: AdamW and its learning rate, as the original's (reference: optims.py, runner_base.py)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vllama_jax.train.config import OptimConfig


def learning_rate(cfg: OptimConfig, steps: int, step: jax.Array | int) -> jax.Array:
    """The rate of update number `step`, counted from 0: a linear warm-up, then a cosine that began at step 0.

    The original divides the step within an epoch by `warmup_steps`; that is the same where an epoch is no shorter than
    the warm-up, as in all its configs.
    """
    warmup = cfg.warmup_lr + (cfg.lr - cfg.warmup_lr) * step / max(cfg.warmup_steps, 1)
    cosine = cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))
    return jnp.where(step < cfg.warmup_steps, warmup, cosine)


class ScheduledOptimizer(NamedTuple):
    """An optax optimizer that knows its learning rate, which metrics then report.

    Attributes:
        init: As of `optax.GradientTransformation`.
        update: As of `optax.GradientTransformation`.
        learning_rate: The number of updates done so far → the learning rate of the next one.
    """

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    learning_rate: Callable[[jax.Array | int], jax.Array]


def make_optimizer(cfg: OptimConfig, steps: int) -> ScheduledOptimizer:
    """AdamW over weights in a dict by path. Biases and norms do not decay; what is frozen has no state at all."""

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
    """Whether weight decay applies: to all but biases and the scales of norms."""
    return path.rsplit("/", 1)[-1] not in ("bias", "scale")
