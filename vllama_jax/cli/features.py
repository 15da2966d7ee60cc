"""The command `vllama features`."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vllama_jax.cli._display import format_count
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
    """Return the command with the fields of the run config as options, the words that start it, and its arguments."""
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
        """Precompute the features of the frozen encoders for every record of a run config's datasets.

        Example: vllama features vision_stage1 --model MODEL --data.variants 4 --out FEATURES

        `vllama train vision_stage1 --data.feature-cache FEATURES --out RUN` reads them instead of media files. Run
        again with the same --out to complete a stopped run. Several processes share the work.

        Args:
            config: A Python file, or a config of the package: {CONFIGS}.
            out: The feature cache directory.
            run: The run config.
            base: The base model, if it is not where the config says.
            shard_records: The number of records in a file; 0 for about 512 MB.
            distributed: Run as one of several processes of a Slurm job, a TPU pod or GKE.
        """
        require_at_least(0, shard_records=shard_records)
        enable_compilation_cache()
        with join_processes(distributed, preemption=False), count_bar() as count:
            from vllama_jax.train.precompute import precompute_features

            prepared = call_on_process_zero_first(lambda: prepare(run, out))
            written = precompute_features(prepared, out, base, shard_records, functools.partial(count, "records"))
        print(_format_summary(out, written))

    features.__doc__ = (features.__doc__ or "").format(CONFIGS=", ".join(shipped_configs()))
    return features, "vllama features", arguments


def _format_summary(out: Path, written: "PrecomputeResult") -> str:
    summary = f"{out}: {format_count(written.num_shards, 'shard')}, {written.bytes / 1e6:.1f} MB"
    if written.num_existing_shards:
        summary += f", {written.num_existing_shards} from an earlier run"
    if written.records:
        rate = written.records / written.seconds
        summary += f"; encoded {format_count(written.records, 'record')}, {rate:.1f} records/s"
    if written.skipped:
        skipped = format_count(len(written.skipped), "record")
        summary += f"\n  skipped {skipped} (skipped-*.jsonl), first {': '.join(written.skipped[0])}"
    return summary
