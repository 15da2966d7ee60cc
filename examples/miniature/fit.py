"""The loop that the frozen parts are trained by: AdamW under a warm-up and a cosine, batches drawn by the caller.

What a branch learns is trained by `vllama train` (vllama_jax/train); this is for what those runs find frozen.
"""

import concurrent.futures
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)
Metrics = dict[str, jax.Array]


def fit(
    module: Module,
    loss: Callable[[Module, Any], tuple[jax.Array, Metrics]],
    batch: Callable[[np.random.Generator], Any],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    name: str,
    log: Callable[[str], None],
    every: int = 100,
) -> Module:
    """Trains all weights of `module` by `loss(module, batch) -> (loss, figures)`; returns it with the new weights.

    The batch of a step is a function of (seed, step). Learning rate: 5 % of the steps up, then a cosine to 5 %.
    """
    graph, weights = nnx.split(module)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 20, steps, learning_rate / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.02))

    def step(weights: nnx.State, opt_state: optax.OptState, batch: Any) -> tuple[nnx.State, optax.OptState, Metrics]:
        def of_weights(weights: nnx.State) -> tuple[jax.Array, Metrics]:
            return loss(nnx.merge(graph, weights), batch)

        (value, figures), gradients = jax.value_and_grad(of_weights, has_aux=True)(weights)
        updates, opt_state = optimizer.update(gradients, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state, {"loss": value, **figures}

    compiled_step = jax.jit(step, donate_argnums=(0, 1))
    opt_state, began, shown = jax.jit(optimizer.init)(weights), time.perf_counter(), []
    pool = concurrent.futures.ThreadPoolExecutor(1)  # draws a step's batch while the one before is computed
    upcoming = pool.submit(batch, np.random.default_rng([seed, 0]))
    for number in range(steps):
        drawn, upcoming = upcoming.result(), pool.submit(batch, np.random.default_rng([seed, number + 1]))
        weights, opt_state, figures = compiled_step(weights, opt_state, drawn)
        shown.append(figures)
        if (number + 1) % every == 0 or number + 1 == steps:
            means = {key: float(np.mean([jax.device_get(one[key]) for one in shown])) for key in figures}
            told = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
            log(f"{name}: step {number + 1} of {steps}  {told}  {time.perf_counter() - began:.0f} s")
            shown = []
    pool.shutdown(cancel_futures=True)
    return nnx.merge(graph, weights)
