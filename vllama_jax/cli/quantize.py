"""vllama quantize."""

from pathlib import Path
from typing import Literal

from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from vllama_jax import quantize as quantizing
from vllama_jax.checkpoint import open_model


def quantize(
    model: Path,
    /,
    *,
    to: Path,
    bits: Literal[8, 4] = 8,
    base: Path | None = None,
) -> None:
    """Write a model, or what a run trained, with LLaMA's and the ViT's large weights in 8 or 4 bits.

    Example: vllama quantize MODEL --to MODEL8

    Args:
        model: A model directory, or a run's.
        to: The model directory to make. It answers; training and exporting need the model that it was made from.
        bits: Of a weight. 8 costs little; `vllama verify` says what it costs.
        base: A run's base model, where that has moved.
    """
    directory = open_model(model, base)
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    before = quantizing.bytes_to_read(directory)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=before)
        quantizing.quantize(directory, to, f"int{bits}", lambda done: bar.advance(task, done))
    after = quantizing.bytes_to_read(open_model(to))
    print(f"{to}: {filesize.decimal(after)} in int{bits} in place of {filesize.decimal(before)}")
