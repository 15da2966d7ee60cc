"""vllama train."""

import math
from pathlib import Path
from typing import Annotated, Any, Self

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from vllama_jax.compilation import keep_compiled_programs
from vllama_jax.cli.run_config import named_config, shipped
from vllama_jax.cli.usage import Command
from vllama_jax.errors import ConfigError
from vllama_jax.train.config import TrainConfig


def with_config(arguments: list[str]) -> tuple[Command, str, list[str]]:
    """The command, whose options are the fields of the config that the first argument names."""
    default, prepare = named_config(arguments, "vllama train vision_stage1 --out RUN")

    def train(
        config: tyro.conf.Positional[str],
        /,
        out: Path,
        run: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        *,
        base: str = "",
        dry_run: bool = False,
        distributed: bool = False,
    ) -> None:
        """Train what a run config says. Every field of the config is an option.

        Example: vllama train vision_stage2 --model MODEL --init STAGE1 --optim.lr 3e-5 --mesh.fsdp 8 --out RUN

        Run again with the same --out it goes on from the last checkpoint.

        Args:
            config: A Python file, or one that is shipped: {CONFIGS}.
            run: The config.
            out: The run directory.
            base: Where the base model is now, if not where the config says.
            dry_run: Build everything, run one batch, tell what it takes of memory and time, and leave no run.
            distributed: One of several processes, of a Slurm job, a TPU pod or GKE.
        """
        keep_compiled_programs()
        join_processes(distributed)
        from vllama_jax.train.dry_run import dry_run as try_out
        from vllama_jax.train.loop import train as go
        from vllama_jax.train.runs import hush_failed_saves

        hush_failed_saves()
        with Display(run.steps) as display:
            prepared = prepare(run, out)
            if dry_run:
                try_out(prepared, display, base)
            else:
                go(prepared, out, display, base)

    train.__doc__ = train.__doc__.format(CONFIGS=", ".join(shipped()))
    return train, "vllama train", arguments


def join_processes(distributed: bool) -> None:
    """Joins the other processes, which JAX finds by itself, or by its own environment variables."""
    if not distributed:
        return
    import jax

    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--distributed: the other processes cannot be found ({error})") from error


class Display:
    """A table of what trains, a bar with how it goes (on a terminal), and sentences. All on stderr."""

    def __init__(self, steps: int):
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._steps = steps
        self._task = None
        self._loss = math.nan

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def table(self, plan: Any) -> None:
        """What trains: path, shape, count, and where its first value comes from."""
        table = Table(Column("weight", overflow="fold"), "shape", Column("count", justify="right"), "from")
        total = 0
        for path in plan.learns:
            shape, source = plan.skeleton.variables[path].shape, plan.sources[path]
            count = math.prod(shape)
            total += count
            origin = (
                "random" if source is None else str(source.trained[-1].path.parent if source.trained else source.path)
            )
            table.add_row(path, "×".join(map(str, shape)), f"{count:,}", origin)
        self._console.print(table)
        frozen = sum(math.prod(v.shape) for p, v in plan.skeleton.variables.items() if p not in plan.sources)
        self.say(f"{total:,} weights train, {frozen:,} are frozen ({plan.dtype.name})")

    def step(self, metrics: dict[str, Any]) -> None:
        loss = metrics["loss"]
        self._loss = loss if math.isnan(self._loss) else 0.98 * self._loss + 0.02 * loss
        told = f"loss {self._loss:.4f}  lr {metrics['lr']:.2e}  {metrics['samples_per_second']:.1f} samples/s"
        told += f"  MFU {metrics['mfu']:.1%}" if "mfu" in metrics else ""
        told += f"  waits {metrics['waited_for_data']:.0%}"
        if self._task is None:
            self._task = self._bar.add_task(told, total=self._steps)
        self._bar.update(self._task, completed=metrics["step"], description=told)
