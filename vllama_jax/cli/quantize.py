"""The command `vllama quantize`."""

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
    """Quantize the large weights of LLaMA and the ViT of a model or a run, and write a model directory.

    Example: vllama quantize MODEL --out MODEL8

    Args:
        model: The model or run directory.
        out: The model directory to create. It is for inference only: training and export need the unquantized model.
        quantize: The type of the quantized weights. int8 costs little accuracy; `vllama verify` measures how much.
        base: The base model of a run, if it has moved.
    """
    check_absent(out)
    directory = open_model(model, base)
    before = quantizing.bytes_to_read(directory)
    with bytes_bar(before) as progress:
        quantizing.quantize(directory, out, quantize, progress)
    after = quantizing.bytes_to_read(open_model(out))
    print(f"{out}: {filesize.decimal(after)} in {quantize}, quantized from {filesize.decimal(before)}")
