"""vllama quantize."""

from pathlib import Path
from typing import Literal

from rich import filesize

from vllama_jax import quantize as quantizing
from vllama_jax.checkpoint import open_model
from vllama_jax.cli.bars import bytes_bar
from vllama_jax.io.atomic import check_absent


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
    check_absent(to)
    directory = open_model(model, base)
    before = quantizing.bytes_to_read(directory)
    with bytes_bar(before) as progress:
        quantizing.quantize(directory, to, f"int{bits}", progress)
    after = quantizing.bytes_to_read(open_model(to))
    print(f"{to}: {filesize.decimal(after)} in int{bits} in place of {filesize.decimal(before)}")
