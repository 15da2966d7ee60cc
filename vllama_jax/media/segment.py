"""A part of a video, and a video that was published as a folder of pictures."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError
from vllama_jax.media.files import check_file, open_container, video_stream
from vllama_jax.media.image import read_image
from vllama_jax.media.report import MediaReport
from vllama_jax.media.video import Video, frame_indices, read_video

if TYPE_CHECKING:
    from jaxtyping import Int64

PICTURES = (".jpg", ".jpeg", ".png")


def read_segment(
    path: str | os.PathLike[str], start: float, end: float, num_frames: int = 8, size: int = 224, audio: bool = True
) -> Video:
    """What a video shows and sounds like from `start` to `end` seconds, as if that were a file of its own.

    Times, duration and report are the segment's; a segment that reaches past the video's end stops there, and has one
    frame at least. Raises MediaError as read_video does, and for an end that is not after the start.
    """
    _check_times(path, start, end)
    rate, total = _frame_rate(path), 0

    def choose(count: int, wanted: int) -> Int64[np.ndarray, "t"]:
        nonlocal total
        total = count
        inside = _inside(count, rate, start, end)
        return inside.start + frame_indices(len(inside), wanted)

    whole = read_video(path, num_frames, size, audio, choose)
    inside = _inside(total, rate, start, end)
    waveform, duration = whole.waveform, len(inside) / rate
    if waveform is not None:
        stop = None if math.isinf(end) else round(end * whole.sample_rate)
        waveform = waveform[:, round(start * whole.sample_rate) : stop]
    return dataclasses.replace(
        whole,
        seconds=whole.seconds - inside.start / rate,
        duration=duration,
        waveform=waveform,
        report=dataclasses.replace(whole.report, seconds=duration),
    )


def read_frames(
    folder: str | os.PathLike[str],
    rate: float,
    num_frames: int = 8,
    size: int = 224,
    start: float = 0.0,
    end: float = math.inf,
) -> Video:
    """A video as the pictures of its frames, `rate` a second, in the order of their names; it has no sound.

    Raises MediaError for a folder without pictures, for a picture that cannot be read, and for an end that is not
    after the start.
    """
    _check_times(folder, start, end)
    pictures = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES)
    if not pictures:
        raise MediaError(f"{folder}: no pictures in the folder (jpg, png); unpack its frames again")
    inside = _inside(len(pictures), rate, start, end)
    indices = frame_indices(len(inside), num_frames)
    frames = np.stack([read_image(pictures[inside.start + index], size) for index in indices])
    duration = len(inside) / rate
    report = MediaReport(str(folder), "video", len(frames), duration, "absent")
    return Video(frames, indices / rate, duration, waveform=None, sample_rate=None, report=report)


def _check_times(path: str | os.PathLike[str], start: float, end: float) -> None:
    if not 0 <= start < end:
        raise MediaError(f"{os.fsdecode(path)}: no segment from {start} to {end} s; check the annotation's times")


def _inside(total: int, rate: float, start: float, end: float) -> range:
    """The frames of a segment, of a video's `total`."""
    first = min(round(start * rate), total - 1)
    last = total if math.isinf(end) else min(math.ceil(end * rate), total)
    return range(first, max(last, first + 1))


def _frame_rate(path: str | os.PathLike[str]) -> float:
    """Of the video in a file, 1 where it has none: reading it says what is wrong."""
    with open_container(check_file(path)) as container:
        stream = video_stream(container)
        return float((stream and (stream.average_rate or stream.guessed_rate)) or 1)
