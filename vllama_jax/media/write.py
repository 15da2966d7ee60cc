"""Frames and sound → an mp4 (H.264 and AAC), such as players, and the readers beside this file, take."""

from __future__ import annotations

import heapq
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import MediaError

if TYPE_CHECKING:
    from av import AudioFrame, VideoFrame
    from av.audio.stream import AudioStream
    from jaxtyping import Float32, UInt8

_LAYOUTS = {1: "mono", 2: "stereo"}  # by number of channels
_REPRODUCIBLE = {"mbtree": "0"}  # x264's macroblock tree differs from run to run, seen at frames of 96 × 96
_AAC_SAMPLES = 1024  # AAC compresses so many at a time


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[UInt8[np.ndarray, "h w 3"]],
    fps: float,
    waveform: Float32[np.ndarray, "c n"] | None = None,
    sample_rate: int = 16000,
) -> None:
    """Writes RGB frames, and beside them sound of one or two channels in [-1, 1], over whatever was at `path`.

    Frames are taken one at a time, so an iterator can make a video that is longer than memory holds. Compression loses
    a little; the same frames and sound make the same file. Raises MediaError for frames that H.264 cannot hold (odd or
    differing sizes, none at all), for sound and rates that do not fit, and for a path that cannot be written.
    """
    import av

    path = os.fsdecode(path)
    if not (math.isfinite(fps) and fps > 0):
        raise MediaError(f"{path}: {fps} frames a second cannot be written; give a number above 0")
    if waveform is not None and (waveform.ndim != 2 or len(waveform) not in _LAYOUTS):
        raise MediaError(f"{path}: sound of shape {list(waveform.shape)}; give [1 or 2 channels, samples]")
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise MediaError(f"{path}: there are no frames to write; give at least one")
    _check_frame(first, first, path)
    rate = Fraction(fps).limit_denominator(1001)  # 29.97… is 30000/1001
    try:
        with av.open(f"file:{path}", "w", format="mp4") as container:
            video = container.add_stream("libx264", rate=rate, options=_REPRODUCIBLE)
            video.height, video.width, video.pix_fmt = *first.shape[:2], "yuv420p"
            audio: AudioStream | None = None
            together: Iterable[VideoFrame | AudioFrame] = _video_frames(
                itertools.chain([first], frames), first, rate, path
            )
            if waveform is not None:
                audio = container.add_stream("aac", rate=sample_rate, layout=_LAYOUTS[len(waveform)])
                together = heapq.merge(
                    together, _audio_frames(waveform, sample_rate), key=lambda frame: frame.time or 0.0
                )
            for frame in together:
                if isinstance(frame, av.VideoFrame):
                    container.mux(video.encode(frame))
                elif audio is not None:
                    container.mux(audio.encode(frame))
            container.mux(video.encode(None))
            if audio is not None:
                container.mux(audio.encode(None))
    except av.FFmpegError as error:
        raise MediaError(f"{path}: the video cannot be written ({error.strerror})") from error


def _video_frames(
    frames: Iterable[UInt8[np.ndarray, "h w 3"]], first: UInt8[np.ndarray, "h w 3"], rate: Fraction, path: str
) -> Iterator[VideoFrame]:
    from av import VideoFrame

    for number, frame in enumerate(frames):
        _check_frame(frame, first, path)
        picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
        picture.pts, picture.time_base = number, 1 / rate
        yield picture


def _audio_frames(waveform: Float32[np.ndarray, "c n"], sample_rate: int) -> Iterator[AudioFrame]:
    from av import AudioFrame

    for start in range(0, waveform.shape[1], _AAC_SAMPLES):
        samples = np.ascontiguousarray(waveform[:, start : start + _AAC_SAMPLES], np.float32)
        sound = AudioFrame.from_ndarray(samples, "fltp", _LAYOUTS[len(waveform)])
        sound.sample_rate, sound.pts, sound.time_base = sample_rate, start, Fraction(1, sample_rate)
        yield sound


def _check_frame(frame: UInt8[np.ndarray, "h w 3"], first: UInt8[np.ndarray, "h w 3"], path: str) -> None:
    """Raises MediaError for a frame that cannot follow the first."""
    shape = list(frame.shape)
    if frame.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
        raise MediaError(f"{path}: a frame of {frame.dtype} and shape {shape}; give uint8 of [height, width, 3]")
    if not frame.size or shape[0] % 2 or shape[1] % 2:
        raise MediaError(f"{path}: frames of {shape[1]}×{shape[0]} pixels; give even sizes, as H.264 needs them")
    if frame.shape != first.shape:
        raise MediaError(f"{path}: a frame of shape {shape} after frames of shape {list(first.shape)}; make them alike")
