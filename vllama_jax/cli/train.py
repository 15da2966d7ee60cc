"""The command `vllama train`."""

import contextlib
from pathlib import Path
from typing import Annotated

import tyro

from vllama_jax.cli._logs import log_to_file
from vllama_jax.cli._run_config import load_named_config
from vllama_jax.cli._training_display import show_training
from vllama_jax.cli._usage import Command
from vllama_jax.runtime.compilation_cache import enable_compilation_cache
from vllama_jax.runtime.coordination import num_processes, process_number
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.config_files import shipped_configs
from vllama_jax.train.processes import call_on_process_zero_first, join_processes


def select_command(arguments: list[str]) -> tuple[Command, str, list[str]]:
    """Return the command with the fields of the run config as options, the words that start it, and its arguments."""
    default, prepare = load_named_config(arguments, "vllama train vision_stage1 --out RUN")

    def train(
        config: tyro.conf.Positional[str],
        /,
        out: Path,
        run: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        *,
        base: str = "",
        dry_run: bool = False,
        verbose: bool = False,
        distributed: bool = False,
        log_dir: Path | None = None,
    ) -> None:
        """Train the weights that a run config selects. Every field of the config is an option.

        Example: vllama train vision_stage2 --model MODEL --init STAGE1 --optim.lr 3e-5 --mesh.fsdp 8 --out RUN

        Run again with the same --out to resume from the last checkpoint.

        Args:
            config: A Python file, or a config of the package: {CONFIGS}.
            run: The run config.
            out: The run directory.
            base: The base model, if it is not where the config says.
            dry_run: Run one batch, report its memory and time, and write nothing.
            verbose: List every trainable parameter instead of one row for each component.
            distributed: Run as one of several processes of a Slurm job, a TPU pod or GKE.
            log_dir: Every process also writes what it reports to a file process_N.log in this directory.
        """
        enable_compilation_cache()
        with contextlib.ExitStack() as stack:
            stack.enter_context(join_processes(distributed, preemption=not dry_run))
            if log_dir is not None:
                log_to_file(log_dir, process_number(), num_processes())
            display = stack.enter_context(show_training(run.steps, process_number(), verbose=verbose))
            from vllama_jax.train import train as run_training
            from vllama_jax.train.dry_run import dry_run as run_dry
            from vllama_jax.train.run_directory import silence_orbax_save_logs

            silence_orbax_save_logs()
            prepared = call_on_process_zero_first(lambda: prepare(run, out))
            if dry_run:
                run_dry(prepared, display, base)
            else:
                run_training(prepared, out, base=base, reporter=display)

    train.__doc__ = (train.__doc__ or "").format(CONFIGS=", ".join(shipped_configs()))
    return train, "vllama train", arguments
