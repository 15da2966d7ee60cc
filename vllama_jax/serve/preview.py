"""What a model takes of a media file, as images for the page of `vllama serve`."""

import base64
import io
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from vllama_jax.config import VideoLlamaConfig
from vllama_jax.media_tokens import PreparedMedia
from vllama_jax.towers import get_tower

SPECTROGRAM_COLORS = ("#000004", "#b73779", "#fcfdbf")  # quiet, medium and loud: black, red and light yellow


def describe_media(prepared: PreparedMedia, config: VideoLlamaConfig) -> dict[str, Any]:
    """Return what a model takes of a file: a summary, the frames and the spectrograms of its audio clips.

    Args:
        prepared: The file, as `media_tokens.prepare_media` returns it.
        config: The model's config.

    Returns:
        `summary`, one line; `frames` and `clips`, lists of objects with `seconds` (the time of a frame or the start of
        a clip; None for an image) and `image`, a data URL.
    """
    frames = [] if prepared.frames is None else [*_restore_pixels(prepared.frames, config)]
    spectrograms = [] if prepared.mel is None else [*scale_to_bytes(prepared.mel)]
    times = prepared.seconds or (None,) * len(frames)
    return {
        "summary": str(prepared.report),
        "frames": [_describe(time, _frame_image(one)) for time, one in zip(times, frames, strict=True)],
        "clips": [
            _describe(time, _spectrogram_image(one))
            for time, one in zip(prepared.clip_starts, spectrograms, strict=True)
        ],
    }


def _restore_pixels(frames: Float[np.ndarray, "t h w 3"], config: VideoLlamaConfig) -> UInt8[np.ndarray, "t h w 3"]:
    """Undo the normalization of frames."""
    tower = get_tower(config.vit)
    return np.clip((frames * tower.std + tower.mean) * 255 + 0.5, 0, 255).astype(np.uint8)


def scale_to_bytes(mel: Float[np.ndarray, "s f m"]) -> UInt8[np.ndarray, "s f m"]:
    """Scale the spectrograms of a file to 0…255: the quietest bin of all is 0, the loudest 255."""
    lowest, highest = float(mel.min()), float(mel.max())
    return ((mel - lowest) * (255 / max(highest - lowest, 1e-6)) + 0.5).astype(np.uint8)


def _describe(seconds: float | None, image: str) -> dict[str, Any]:
    return {"seconds": seconds, "image": image}


def _frame_image(frame: UInt8[np.ndarray, "h w 3"]) -> str:
    return _data_url(Image.fromarray(frame), "JPEG", quality=80)


def _spectrogram_image(mel: UInt8[np.ndarray, "f m"]) -> str:
    """Return a spectrogram with low frequencies at the bottom."""
    quiet, medium, loud = SPECTROGRAM_COLORS
    image = ImageOps.colorize(Image.fromarray(mel[::-1]), black=quiet, mid=medium, white=loud)
    return _data_url(image.quantize(64), "PNG", optimize=True)


def _data_url(image: Image.Image, format_name: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return f"data:image/{format_name.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
