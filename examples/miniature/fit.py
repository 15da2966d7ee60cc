"""The training loop of the frozen components: AdamW with warmup and a cosine schedule.

The branches are trained with `vllama train`. These runs take the components that this module trains as frozen.
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
    """Train all weights of a module.

    The learning rate rises linearly over the first 5 % of the steps and then falls to 5 % along a cosine.

    Args:
        module: The initial module.
        loss: `loss(module, batch)` returns the loss and further metrics, all scalars.
        batch: `batch(rng)` returns the batch of a step. Its generator depends on the seed and the step only.
        steps: The number of steps.
        learning_rate: The peak learning rate.
        seed: The seed of the batches.
        name: What to call the module in progress messages.
        log: Called with progress messages.
        every: Steps between progress messages, which have the mean of each metric.

    Returns:
        The module with trained weights.
    """
    graph, weights = nnx.split(module)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 20, steps, learning_rate / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.02))

    def step(weights: nnx.State, opt_state: optax.OptState, batch: Any) -> tuple[nnx.State, optax.OptState, Metrics]:
        def compute_loss(weights: nnx.State) -> tuple[jax.Array, Metrics]:
            return loss(nnx.merge(graph, weights), batch)

        (value, metrics), gradients = jax.value_and_grad(compute_loss, has_aux=True)(weights)
        updates, opt_state = optimizer.update(gradients, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state, {"loss": value, **metrics}

    compiled_step = jax.jit(step, donate_argnums=(0, 1))
    opt_state, start, recent = jax.jit(optimizer.init)(weights), time.perf_counter(), []
    pool = concurrent.futures.ThreadPoolExecutor(1)  # prepares the next batch during a step
    upcoming = pool.submit(batch, np.random.default_rng([seed, 0]))
    for number in range(steps):
        current, upcoming = upcoming.result(), pool.submit(batch, np.random.default_rng([seed, number + 1]))
        weights, opt_state, metrics = compiled_step(weights, opt_state, current)
        recent.append(metrics)
        if (number + 1) % every == 0 or number + 1 == steps:
            means = {key: float(np.mean([jax.device_get(one[key]) for one in recent])) for key in metrics}
            summary = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
            log(f"{name}: step {number + 1} of {steps}  {summary}  {time.perf_counter() - start:.0f} s")
            recent = []
    pool.shutdown(cancel_futures=True)
    return nnx.merge(graph, weights)
