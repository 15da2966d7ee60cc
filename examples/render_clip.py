"""Render an example clip of four seconds: a ball crosses a meadow, and a bell rings twice.

python examples/render_clip.py clip.mp4
"""

import sys

import numpy as np

from vllama_jax.media import write_video

WIDTH, HEIGHT, FPS, SECONDS, RATE = 320, 240, 25, 4, 44100


def render_frame(second: float) -> np.ndarray:
    """Render the frame at a time, uint8 [height, width, 3]: sky, grass, and a red ball that moves to the right."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    frame = np.where((rows < HEIGHT // 2)[..., None], (150, 200, 255), (60, 160, 60)).astype(np.uint8)
    x, y = 30 + (WIDTH - 60) * second / SECONDS, HEIGHT * 0.6
    frame[(columns - x) ** 2 + (rows - y) ** 2 < 25**2] = (220, 40, 30)
    return frame


def synthesize_bell() -> np.ndarray:
    """Synthesize a bell that rings after one and after three seconds: a mono waveform, float32 [1, samples]."""
    time = np.arange(SECONDS * RATE) / RATE
    waveform = np.zeros_like(time)
    for start in (1.0, 3.0):
        elapsed = np.maximum(time - start, 0)
        waveform += 0.4 * np.sin(2 * np.pi * 880 * elapsed) * np.exp(-4 * elapsed)
    return waveform[None].astype(np.float32)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/render_clip.py CLIP.mp4")
    frames = (render_frame(number / FPS) for number in range(SECONDS * FPS))
    write_video(sys.argv[1], frames, FPS, synthesize_bell(), RATE)
