"""vllama features."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vllama_jax.cli._progress import count_bar
from vllama_jax.cli._run_config import load_named_config
from vllama_jax.cli._usage import Command, require_at_least
from vllama_jax.runtime.compilation_cache import enable_compilation_cache
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.config_files import shipped_configs
from vllama_jax.train.processes import call_on_process_zero_first, join_processes

if TYPE_CHECKING:
    from vllama_jax.train.precompute import PrecomputeResult


def select_command(arguments: list[str]) -> tuple[Command, str, list[str]]:
    """The command, whose options are the fields of the config that the first argument names."""
    default, prepare = load_named_config(arguments, "vllama features vision_stage1 --out DIR")

    def features(
        config: tyro.conf.Positional[str],
        /,
        out: Path,
        run: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        *,
        base: str = "",
        shard_records: int = 0,
        distributed: bool = False,
    ) -> None:
        """Write what the frozen encoders make of every record of a run config's datasets, once.

        Example: vllama features vision_stage1 --model MODEL --data.variants 4 --out FEATURES

        Then `vllama train vision_stage1 --data.feature-cache FEATURES --out RUN` reads it instead of the media files.
        Run again with the same --out it makes what is missing. Several processes share the work.

        Args:
            config: A Python file, or one that is shipped: {CONFIGS}.
            out: The directory of the cache.
            run: The config.
            base: Where the base model is now, if not where the config says.
            shard_records: How many records a file holds; 0 for some 512 MB of them.
            distributed: One of several processes, of a Slurm job, a TPU pod or GKE.
        """
        require_at_least(0, shard_records=shard_records)
        enable_compilation_cache()
        with join_processes(distributed, preemption=False), count_bar() as count:
            from vllama_jax.train.precompute import precompute_features

            prepared = call_on_process_zero_first(lambda: prepare(run, out))
            written = precompute_features(prepared, out, base, shard_records, functools.partial(count, "records"))
        print(_summary(out, written))

    features.__doc__ = (features.__doc__ or "").format(CONFIGS=", ".join(shipped_configs()))
    return features, "vllama features", arguments


def _summary(out: Path, written: "PrecomputeResult") -> str:
    num_shards = f"{written.num_shards} shards" if written.num_shards != 1 else "1 shard"
    summary = f"{out}: {num_shards}, {written.bytes / 1e6:.1f} MB"
    if written.num_existing_shards:
        summary += f", {written.num_existing_shards} of them from before"
    if written.records:
        summary += f"; {written.records} records encoded, {written.records / written.seconds:.1f} records/s"
    if written.skipped:
        summary += f"\n  left out, {len(written.skipped)} records (skipped-*.jsonl); the first: "
        summary += ": ".join(written.skipped[0])
    return summary
