"""Which frames of a video are sampled: how many or how often, and from which window."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from jaxtyping import Int64

    from vllama_jax.media.clock import FrameTimes
    from vllama_jax.media.video import WindowSampler

MAX_RATE = 1000  # frames per second; the instants of a window are listed, and videos have fewer frames
_TIME_TOLERANCE = 1e-6  # s; of sums of floating-point timestamps
_CLOCK_TIME = re.compile(r"(?:(\d{1,6}):)?(\d{1,6}):(\d\d?(?:\.\d*)?)", re.ASCII)  # H:MM:SS or MM:SS
_NUMBER = re.compile(r"[-+]?(?:inf|nan|(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)", re.ASCII | re.IGNORECASE)
_END_TOLERANCE = 0.1  # s; by which a window may extend past the end of the file without a note


@dataclasses.dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are sampled, and from which window. Audio is sampled from the same window.

    Attributes:
        num_frames: The number of frames to sample from a video at even intervals; by default the model's. All frames
            of the window are used if it has fewer.
        fps: Frames per second to sample from a video, instead of a number of frames.
        max_frames: With a rate, sample at most this number of frames, at even intervals. The report has a note
            if this limit applies.
        start: Start of the window: seconds, or a text such as 62:03.5 or 1:02:03.5.
        end: End of the window, likewise. The window ends at the end of the file at the latest.
        segments: Cut the window into this number of segments of equal length. Each is sampled and encoded by itself.

    Raises:
        ConfigError: A value is out of range, or two of them contradict each other.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    start: float | str = 0.0
    end: float | str = math.inf
    segments: int = 1

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            object.__setattr__(self, name, parse_time(name, getattr(self, name)))
        start, end = self.window
        for name in ("num_frames", "max_frames", "segments"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ConfigError(f"fps must be above 0, not {self.fps:g}")
        if self.fps is not None and self.fps > MAX_RATE:
            raise ConfigError(f"fps must be at most {MAX_RATE}, not {self.fps:g}")
        if self.fps is not None and self.num_frames is not None:
            raise ConfigError("fps cannot be combined with a number of frames: give one of the two")
        if self.max_frames is not None and self.fps is None:
            raise ConfigError("max_frames needs fps: without it, give the number of frames instead")
        if self.segments > 1 and self.fps is not None:
            raise ConfigError("segments have the same number of frames each: give it instead of fps")
        if not (math.isfinite(start) and start >= 0):
            raise ConfigError(f"start must be at least 0 s, not {start:g}")
        if not end > start:
            raise ConfigError(f"end must be above the start of the window, {start:g} s, not {end:g}")

    @property
    def window(self) -> tuple[float, float]:
        """Start and end of the window, in seconds."""
        return float(self.start), float(self.end)

    def make_sampler(self, path: str, num_frames: int, max_positions: int | None = None) -> WindowSampler:
        """Return the function that chooses the frames of a video, for `video.decode_window`.

        Args:
            path: The file, for messages.
            num_frames: The number of frames if neither it nor `fps` is set.
            max_positions: The largest number of frames that the model takes; None for any.

        Returns:
            A function from the timestamps of all frames and the range of the window's frames to ascending indices. It
            raises MediaError if the window begins past the end of the file, and ConfigError if there are more frames
            than `max_positions`.
        """

        def sample(times: FrameTimes, window: range) -> Int64[np.ndarray, "t"]:
            if self.window[0] >= times.end:
                raise MediaError(past_the_end(path, self.window[0], times.end))
            if self.fps is None:
                return window.start + frame_indices(len(window), self.num_frames or num_frames)
            indices = self._sample_by_rate(times, window)
            if max_positions is not None and len(indices) > max_positions:
                raise ConfigError(
                    f"{path}: {self.fps:g} frames per second are {len(indices)} frames, but the model has "
                    f"{max_positions} learned frame positions; set --max-frames {max_positions}, or add "
                    "--interpolate-positions"
                )
            return indices

        return sample

    def _sample_by_rate(self, times: FrameTimes, window: range) -> Int64[np.ndarray, "t"]:
        """Return the frames that are visible at every multiple of 1 / fps from the start of the window on."""
        start = max(self.window[0], float(times.starts[window.start]))
        end = min(self.window[1], times.end)
        instants = start + np.arange(self._count(end - start)) / (self.fps or 1)
        visible = np.searchsorted(times.starts, instants + _TIME_TOLERANCE, side="right") - 1
        indices = np.unique(np.clip(visible, window.start, window.stop - 1))
        return indices[frame_indices(len(indices), self.max_frames)] if self.max_frames else indices

    def _count(self, seconds: float) -> int:
        return max(math.ceil((seconds - _TIME_TOLERANCE) * (self.fps or 1)), 1)

    def make_notes(self, num_frames: int, duration: float) -> tuple[str, ...]:
        """Return remarks for the report of a video that was sampled: what was requested and is not there.

        Args:
            num_frames: The number of frames that were sampled.
            duration: Of the window in the file, in seconds.
        """
        notes = []
        if self.fps and num_frames == self.max_frames and self._count(duration) > num_frames:
            notes.append(f"limited to {num_frames} frames instead of {self.fps:g} per second")
        start, end = self.window
        if math.isfinite(end) and end - start - duration > _END_TOLERANCE:
            notes.append(f"the file ends at {start + duration:.1f} s, before the end of the window")
        return tuple(notes)


def parse_time(name: str, value: float | str) -> float:
    """Return a time in seconds.

    Args:
        name: Its name, for the message.
        value: Seconds, or a text: seconds, minutes and seconds (62:03.5), or hours, minutes and seconds (1:02:03.5).

    Raises:
        ConfigError: The text is not a time.
    """
    if not isinstance(value, str):
        return value
    if found := _CLOCK_TIME.fullmatch(value.strip()):
        hours, minutes, seconds = int(found[1] or 0), int(found[2]), float(found[3])
        if seconds < 60 and (found[1] is None or minutes < 60):
            return 3600 * hours + 60 * minutes + seconds
    elif _NUMBER.fullmatch(value.strip()):
        return float(value)
    shown = value if len(value) <= 40 else f"{value[:40]}…"
    raise ConfigError(f"{name} must be a time in seconds, MM:SS or H:MM:SS, not {shown!r}")


def frame_indices(total: int, num_frames: int) -> Int64[np.ndarray, "t"]:
    """Sample frames at even intervals, starting with the first, as in the original.

    Args:
        total: The number of frames of the video.
        num_frames: The number of frames to sample.

    Returns:
        Indices in ascending order, rounded down; all indices if `total` is less than `num_frames`.
    """
    num_frames = min(num_frames, total)
    if not num_frames:
        return np.zeros(0, np.int64)
    return np.arange(0, total, total / num_frames)[:num_frames].astype(np.int64)


def past_the_end(path: str, start: float, duration: float) -> str:
    """Return the message for a window that begins past the end of a file."""
    return f"{path}: the window starts at {start:g} s, but the file ends at {duration:.1f} s; choose an earlier start"
