"""Convert decoded audio frames to samples, and check their format."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av import AudioFrame
    from jaxtyping import Float32

_MAX_RATE = 768_000  # Hz; the highest rate of PCM recorders
_MAX_VALUES_PER_SECOND = 3_072_000  # of all channels: 64 channels at 48 kHz, 8 at 384 kHz
_MAX_ABS_VALUE = 1e9  # full scale is 1, but some floating-point files use the scale of 16 or 32 bits


def check_format(sample_rate: int, channels: int = 1) -> str:
    """Return why audio of this format is rejected, or an empty string. Memory for its clips grows with both values."""
    if sample_rate > _MAX_RATE or sample_rate * channels > _MAX_VALUES_PER_SECOND:
        return f"it has {sample_rate:,} Hz in {channels:,} channels; convert it to 48 kHz stereo"
    return ""


def count_channels(frame: AudioFrame) -> int:
    """Return the number of channels of a decoded frame."""
    layout = frame.layout
    if "(" in layout.name:  # as in "6 channels (FL+FR+LFE+BL+BR+FC)"
        # PyAV 17.1 to 19.0 free a custom layout's list of channels twice, with the frame and with this object, which
        # aborts the process. The extra reference keeps this object alive.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(layout))
    return layout.nb_channels


def to_float(frame: AudioFrame, channels: int) -> Float32[np.ndarray, "c n"]:
    """Convert a decoded frame to [channels, samples] in [-1, 1]; integers are divided by -1 times their minimum.

    Raises:
        ValueError: Values are not finite or too large, or PyAV cannot read the sample format.
    """
    samples: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, channels).T
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    if not np.abs(samples).max(initial=0) <= _MAX_ABS_VALUE:
        raise ValueError("it contains values that are not finite or above 1e9")
    return samples.astype(np.float32, copy=False)
