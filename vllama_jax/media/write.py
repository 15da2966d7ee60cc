"""Write frames and a waveform to an mp4 (H.264 and AAC)."""

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
_REPRODUCIBLE = {"mbtree": "0"}  # x264's macroblock tree differs from run to run (observed with frames of 96 × 96)
_AAC_SAMPLES = 1024  # per AAC frame


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[UInt8[np.ndarray, "h w 3"]],
    fps: float,
    waveform: Float32[np.ndarray, "c n"] | None = None,
    sample_rate: int = 16000,
) -> None:
    """Write RGB frames, and optionally audio, to an mp4 file. An existing file is overwritten.

    Compression is lossy. The same frames and audio give the same file.

    Args:
        path: The file.
        frames: Frames of the same, even height and width. They are consumed one at a time, so an iterator can yield
            more frames than fit in memory.
        fps: Frames per second.
        waveform: One or two channels in [-1, 1].
        sample_rate: Of the waveform, in Hz.

    Raises:
        MediaError: There are no frames, their shapes, the waveform or the rates are not supported, or the file cannot
            be written.
    """
    import av

    path = os.fsdecode(path)
    if not (math.isfinite(fps) and fps > 0):
        raise MediaError(f"{path}: fps is {fps}; it must be a finite number above 0")
    if waveform is not None and (waveform.ndim != 2 or len(waveform) not in _LAYOUTS):
        raise MediaError(f"{path}: waveform of shape {list(waveform.shape)}; expected [1 or 2 channels, samples]")
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise MediaError(f"{path}: there are no frames to write; pass at least one")
    _check_frame(first, first, path)
    rate = Fraction(fps).limit_denominator(1001)  # 29.97… is 30000/1001
    try:
        with av.open(f"file:{path}", "w", format="mp4") as container:
            video = container.add_stream("libx264", rate=rate, options=_REPRODUCIBLE)
            video.height, video.width, video.pix_fmt = *first.shape[:2], "yuv420p"
            audio: AudioStream | None = None
            frames = itertools.chain([first], frames)
            in_time: Iterable[VideoFrame | AudioFrame] = _video_frames(frames, first, rate, path)
            if waveform is not None:
                audio = container.add_stream("aac", rate=sample_rate, layout=_LAYOUTS[len(waveform)])
                audio_frames = _audio_frames(waveform, sample_rate)
                in_time = heapq.merge(in_time, audio_frames, key=lambda frame: frame.time or 0.0)
            for frame in in_time:
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
        video_frame = VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
        video_frame.pts, video_frame.time_base = number, 1 / rate
        yield video_frame


def _audio_frames(waveform: Float32[np.ndarray, "c n"], sample_rate: int) -> Iterator[AudioFrame]:
    from av import AudioFrame

    for start in range(0, waveform.shape[1], _AAC_SAMPLES):
        samples = np.ascontiguousarray(waveform[:, start : start + _AAC_SAMPLES], np.float32)
        audio_frame = AudioFrame.from_ndarray(samples, "fltp", _LAYOUTS[len(waveform)])
        audio_frame.sample_rate, audio_frame.pts = sample_rate, start
        audio_frame.time_base = Fraction(1, sample_rate)
        yield audio_frame


def _check_frame(frame: UInt8[np.ndarray, "h w 3"], first: UInt8[np.ndarray, "h w 3"], path: str) -> None:
    """Raise MediaError if a frame is not RGB, has an odd size, or another shape than the first."""
    shape = list(frame.shape)
    if frame.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
        raise MediaError(f"{path}: frame of type {frame.dtype} and shape {shape}; expected uint8 [height, width, 3]")
    if not frame.size or shape[0] % 2 or shape[1] % 2:
        raise MediaError(f"{path}: frames of {shape[1]}×{shape[0]} pixels; H.264 requires an even width and height")
    if frame.shape != first.shape:
        raise MediaError(
            f"{path}: frame of shape {shape} after frames of shape {list(first.shape)}; all frames must have one shape"
        )
