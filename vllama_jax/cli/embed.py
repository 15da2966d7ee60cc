"""The command `vllama embed`."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vllama_jax.checkpoints.shipped import find_clip
from vllama_jax.cli._display import Display, format_count
from vllama_jax.cli._progress import count_bar
from vllama_jax.cli._usage import JsonFlag, MediaArgument, UsageError
from vllama_jax.embed.files import EmbedOptions

if TYPE_CHECKING:
    from vllama_jax.embed.storage import WrittenFeatures

DEFAULTS = EmbedOptions()
MAX_LISTED_ERRORS = 5


def embed(
    files: tyro.conf.Positional[tuple[MediaArgument, ...]],
    /,
    *,
    out: Path,
    model: Path,
    options: Annotated[EmbedOptions, tyro.conf.arg(name="")] = DEFAULTS,
    dtype: Literal["float32", "bfloat16"] | None = None,
    base: Path | None = None,
    json_output: JsonFlag = False,
) -> None:
    """Write features of video, image and audio files: of frames, of the Q-Formers, media tokens, ImageBind's vectors.

    Run the same command again to resume a stopped one.

    Example: vllama embed *.mp4 *.jpg --features imagebind --model MODEL --out features.safetensors

    docs/embeddings.md describes the arrays, the index, and what can be compared with what.

    Args:
        files: The files.
        out: The file to write, .safetensors or .npz. The index is written next to it, with the suffix .json.
        model: A model directory (see `vllama convert`), a run directory (see `vllama train`), hf://OWNER/NAME on the
            Hugging Face Hub, or `miniature`, the small model of the package.
        options: What is computed.
        dtype: The dtype of weights and computation; by default float32 on a CPU and bfloat16 elsewhere. The output is
            float32.
        base: The base model of a run, if it has moved.
        json_output: Print one JSON object with the shapes of the arrays, the number of files, and the errors of those
            that cannot be used.
    """
    from vllama_jax.checkpoints.directory import open_model
    from vllama_jax.embed.storage import write_features

    if not files:
        raise UsageError("FILES is missing. Example: vllama embed clip.mp4 --model MODEL --out features.safetensors")
    with Display(quiet=json_output) as display:
        directory = open_model(model, base)
        with count_bar() as count:
            progress = functools.partial(count, "files")
            written = write_features(directory, [find_clip(file) for file in files], out, options, dtype, progress)
        for line in _format_errors(written, out):
            display.show_message(line)
    print(json.dumps(dataclasses.asdict(written)) if json_output else _format_summary(written, out))


def _format_errors(written: "WrittenFeatures", out: Path) -> Iterator[str]:
    """Yield a line for each of the first files that cannot be used."""
    yield from (f"not used: {error}" for error in written.errors[:MAX_LISTED_ERRORS])
    if len(written.errors) > MAX_LISTED_ERRORS:
        yield f"not used: {len(written.errors)} files in total; {out.with_suffix('.json')} lists the reasons"


def _format_summary(written: "WrittenFeatures", out: Path) -> str:
    """Return a line for each array, and one for the files."""
    width = max(map(len, written.shapes))
    lines = [f"{name:{width}}  {list(shape)}" for name, shape in written.shapes.items()]
    used = f"{written.num_files - len(written.errors)} of {format_count(written.num_files, 'file')}"
    return "\n".join([*lines, f"{out}: features of {used}; index: {out.with_suffix('.json')}"])
