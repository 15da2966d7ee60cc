"""Dry run: set up a run, run two steps on one batch, and report memory and time."""

import time

import jax

from vllama_jax.memory.flops import peak_flops, step_flops
from vllama_jax.sharding import use_mesh
from vllama_jax.train import setup
from vllama_jax.train.batch_exchange import BatchExchange
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.hosts import plan_job
from vllama_jax.train.loop import make_train_step
from vllama_jax.train.reporter import Reporter


def dry_run(config: TrainConfig, reporter: Reporter, base: str = "") -> None:
    """Report the memory of a step on each device and the expected duration of the run. Write no files.

    Args:
        config: The run config.
        reporter: Receives the report.
        base: The base model directory, if it is no longer at `config.model`.

    Raises:
        VllamaError: The run cannot be started.
    """
    plan = plan_job(config, base)
    with use_mesh(plan.mesh):
        reporter.show_plan(plan)
        state, frozen = setup.init_train_state(plan), setup.load_frozen(plan)
        start_time = time.perf_counter()
        host_batch = BatchExchange(plan.reader.rows).read(0, lambda: plan.reader(0))
        read_seconds = time.perf_counter() - start_time
        batch = setup.shard_batch(host_batch.arrays, plan)
        step = make_train_step(plan).lower(state, frozen, batch).compile()
        compile_seconds = time.perf_counter() - start_time - read_seconds
        state, metrics = step(state, frozen, batch)
        loss = float(metrics["loss"])
        start_time = time.perf_counter()
        jax.block_until_ready(step(state, frozen, batch))
        seconds = time.perf_counter() - start_time
    memory = step.memory_analysis()
    reporter.show_message(
        f"memory on each device: {_gigabytes(memory.argument_size_in_bytes)} static (parameters, optimizer state, "
        f"batch), {_gigabytes(memory.temp_size_in_bytes)} temporary"
    )
    reporter.show_message(
        f"reading a batch: {read_seconds:.2f} s (a run reads ahead in parallel); compiling: {compile_seconds:.1f} s"
    )
    hours = config.steps * seconds / 3600
    summary = f"one step: {seconds:.2f} s, loss {loss:.4f}; {config.steps} steps: {hours:.1f} hours"
    if peak := peak_flops(jax.devices()[0]):
        flops = step_flops(plan.base.config, config.branch, batch, config.remat_policy)
        summary += f"; MFU {flops / seconds / peak / jax.device_count():.1%}"
    reporter.show_message(summary)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
