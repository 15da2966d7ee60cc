"""vllama quantize."""

from pathlib import Path
from typing import Literal

import tyro
from rich import filesize

from vllama_jax.checkpoints import quantize as quantizing
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli._progress import bytes_bar
from vllama_jax.io.atomic import check_absent


def quantize(
    model: tyro.conf.Positional[Path],
    /,
    *,
    out: Path,
    quantize: Literal["int8", "int4"] = "int8",
    base: Path | None = None,
) -> None:
    """Write a model, or what a run trained, with LLaMA's and the ViT's large weights in 8 or 4 bits.

    Example: vllama quantize MODEL --out MODEL8

    Args:
        model: A model directory, or a run's.
        out: The model directory to make. It answers; training and exporting need the model that it was made from.
        quantize: The type of a weight. int8 costs little accuracy; `vllama verify` says how much.
        base: A run's base model, where that has moved.
    """
    check_absent(out)
    directory = open_model(model, base)
    before = quantizing.bytes_to_read(directory)
    with bytes_bar(before) as progress:
        quantizing.quantize(directory, out, quantize, progress)
    after = quantizing.bytes_to_read(open_model(out))
    print(f"{out}: {filesize.decimal(after)} in {quantize} in place of {filesize.decimal(before)}")
