"""Renders a clip to try things on: a ball crosses a meadow and rings twice.

python examples/render_clip.py clip.mp4
"""

import sys

import numpy as np

from vllama_jax.media import write_video

WIDTH, HEIGHT, FPS, SECONDS, RATE = 320, 240, 25, 4, 44100


def picture(second: float) -> np.ndarray:
    """RGB [height, width, 3]: sky, grass, and a red ball on its way from left to right."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    frame = np.where((rows < HEIGHT // 2)[..., None], (150, 200, 255), (60, 160, 60)).astype(np.uint8)
    x, y = 30 + (WIDTH - 60) * second / SECONDS, HEIGHT * 0.6
    frame[(columns - x) ** 2 + (rows - y) ** 2 < 25**2] = (220, 40, 30)
    return frame


def ringing() -> np.ndarray:
    """Mono sound [1, samples], float32: a bell at one and at three seconds."""
    time = np.arange(SECONDS * RATE) / RATE
    sound = np.zeros_like(time)
    for start in (1.0, 3.0):
        since = np.maximum(time - start, 0)
        sound += 0.4 * np.sin(2 * np.pi * 880 * since) * np.exp(-4 * since)
    return sound[None].astype(np.float32)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/render_clip.py CLIP.mp4")
    pictures = (picture(number / FPS) for number in range(SECONDS * FPS))
    write_video(sys.argv[1], pictures, FPS, ringing(), RATE)
