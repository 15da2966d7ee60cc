"""Renders a clip to try things on: a ball crosses a meadow and rings twice.

python examples/render_clip.py clip.mp4
"""

import sys
from fractions import Fraction

import av
import numpy as np

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


def render(path: str) -> None:
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = container.add_stream("aac", rate=RATE, layout="mono")
        for number in range(SECONDS * FPS):
            frame = av.VideoFrame.from_ndarray(picture(number / FPS), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
        sound = ringing()
        for start in range(0, sound.shape[1], 1024):
            piece = av.AudioFrame.from_ndarray(sound[:, start : start + 1024], "fltp", "mono")
            piece.rate, piece.pts, piece.time_base = RATE, start, Fraction(1, RATE)
            container.mux(audio.encode(piece))
        for stream in (video, audio):
            container.mux(stream.encode(None))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/render_clip.py CLIP.mp4")
    render(sys.argv[1])
