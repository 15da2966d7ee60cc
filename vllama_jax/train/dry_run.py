"""A run that is tried out: everything is built, one batch goes through, and what it takes is told."""

import time

import jax

from vllama_jax.memory.flops import peak_flops, step_flops
from vllama_jax.sharding import under
from vllama_jax.train import setup
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.loop import compile_step
from vllama_jax.train.reporter import Reporter


def dry_run(config: TrainConfig, reporter: Reporter, base: str = "") -> None:
    """Says what a step takes on each device, and how long the run will be. Writes nothing.

    Raises a VllamaError for what cannot be run.
    """
    plan = setup.plan_run(config, base)
    with under(plan.mesh):
        reporter.table(plan)
        state, frozen = setup.start(plan), setup.load_frozen(plan)
        begun = time.perf_counter()
        host_batch = plan.reader(0)
        reading = time.perf_counter() - begun
        batch = setup.place(host_batch.arrays, plan)
        step = compile_step(plan).lower(state, frozen, batch).compile()
        compiling = time.perf_counter() - begun - reading
        state, metrics = step(state, frozen, batch)
        loss = float(metrics["loss"])
        begun = time.perf_counter()
        jax.block_until_ready(step(state, frozen, batch))
        seconds = time.perf_counter() - begun
    memory = step.memory_analysis()
    reporter.say(
        f"on each device: {_gigabytes(memory.argument_size_in_bytes)} of weights, moments and batch, "
        f"{_gigabytes(memory.temp_size_in_bytes)} while a step runs"
    )
    reporter.say(f"reading a batch {reading:.2f} s (others are read meanwhile), compiling {compiling:.1f} s")
    told = f"a step {seconds:.2f} s, loss {loss:.4f}; {config.steps} steps {config.steps * seconds / 3600:.1f} hours"
    if peak := peak_flops(jax.devices()[0]):
        flops = step_flops(plan.base.config, config.branch, batch, config.remat_policy)
        told += f"; MFU {flops / seconds / peak / jax.device_count():.1%}"
    reporter.say(told)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
