"""Decoding of videos, compared with a bare PyAV loop and with torchcodec.

    python benchmarks/media.py [--size medium] [--rounds 3]

A clip of H.264, 320 × 180 pixels at 25 frames per second, is decoded and scaled to 224 × 224: all frames, and eight of
them, for which `read_video` seeks. torchcodec is measured if it is installed and FFmpeg's libraries are found.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from clips import FPS, read_with_pyav, write_clip
from timing import THREADS, compare, parse_arguments, write_results

from vllama_jax import media

SECONDS = {"tiny": 2, "medium": 60, "full": 60}
FRAMES, PIXELS = 8, 224


def read_with_torchcodec(path: Path, count: int | None = None) -> Any:
    """Decode all frames, or `count` at equal distances, and scale them."""
    import torch
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=THREADS)
    total = len(decoder)
    if count is not None:
        wanted = np.linspace(0, total - 1, count).astype(int).tolist()
        return _scale(decoder.get_frames_at(wanted).data)
    return torch.cat([_scale(decoder[start : start + 100]) for start in range(0, total, 100)])


def _scale(frames: Any) -> Any:
    import torch

    return torch.nn.functional.interpolate(frames, (PIXELS, PIXELS), mode="bilinear")


def find_other_readers() -> tuple[dict[str, Callable[..., Any]], str]:
    """Return the readers to compare with, by name, and why torchcodec is not among them."""
    readers: dict[str, Callable[..., Any]] = {"PyAV": functools.partial(read_with_pyav, size=PIXELS)}
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # without FFmpeg's libraries, it raises RuntimeError
        return readers, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return {**readers, "torchcodec": read_with_torchcodec}, ""


def main() -> None:
    """Measure both and write the results."""
    options = parse_arguments(__doc__)
    seconds = SECONDS[options.size]
    readers, missing = find_other_readers()
    if missing:
        print(f"torchcodec: not measured: {missing}")
    with tempfile.TemporaryDirectory() as folder:
        path = write_clip(Path(folder, "clip.mp4"), gop=FPS, seconds=seconds)
        rows = []
        for name, count in {f"all {seconds * FPS} frames": None, f"{FRAMES} frames of {seconds} s": FRAMES}.items():
            num_frames = count or seconds * FPS
            read = functools.partial(media.read_video, path, num_frames, audio=False)
            others = {other: functools.partial(reader, path, count=count) for other, reader in readers.items()}
            rows += [
                compare(f"{name}, {other}", read, {other: run}, options.rounds, frames=num_frames)
                for other, run in others.items()
            ]
    write_results(options.out, "media", rows, size=options.size, missing={"torchcodec": missing} if missing else {})


if __name__ == "__main__":
    main()
