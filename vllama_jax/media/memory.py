"""Read windows of media that are not one file: arrays, and images that are the frames of a video."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

from vllama_jax.errors import MediaError
from vllama_jax.media.arrays import AudioArrays, VideoArrays, read_audio_arrays, read_video_arrays
from vllama_jax.media.audio import Audio
from vllama_jax.media.frame_sampling import FrameSampling, past_the_end
from vllama_jax.media.image_frames import ImageFrames, read_image_frames
from vllama_jax.media.video import DEFAULT_NUM_FRAMES, Video

FramesOrAudio: TypeAlias = ImageFrames | VideoArrays | AudioArrays


def read_window(
    source: FramesOrAudio,
    sampling: FrameSampling,
    size: int,
    audio: bool,
    num_clips: int | None,
    max_positions: int | None = None,
) -> Video | Audio:
    """Read the window that `sampling` says; see `media.read_media`.

    Raises:
        MediaError: The arrays or images cannot be used, or the window is past their end.
    """
    if isinstance(source, AudioArrays):
        if not audio:
            raise MediaError(
                f"{source.name}: the file contains only audio, and audio is off; enable audio or choose a video"
            )
        start, _ = sampling.window
        if start and start >= source.duration:
            raise MediaError(past_the_end(source.name, start, source.duration))
        return _add_notes(read_audio_arrays(source, num_clips, sampling.window), sampling)
    sampler = sampling.make_sampler(source.name, DEFAULT_NUM_FRAMES, max_positions)
    if isinstance(source, VideoArrays):
        return _add_notes(read_video_arrays(source, sampler, size, audio, num_clips, sampling.window), sampling)
    return _add_notes(read_image_frames(source, sampler, size, sampling.window), sampling)


def _add_notes(media: Video | Audio, sampling: FrameSampling) -> Video | Audio:
    notes = sampling.make_notes(media.report.num_frames, media.report.duration)
    return dataclasses.replace(media, report=dataclasses.replace(media.report, notes=notes))
