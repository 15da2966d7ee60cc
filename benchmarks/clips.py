"""Video files for benchmarks, written on the spot: H.264 of 320 × 180 pixels at 25 frames per second."""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FPS, WIDTH, HEIGHT, RATE = 25, 320, 180, 44100


def draw_frames(count: int) -> Iterator[av.VideoFrame]:
    """Yield frames of a gradient with noise that moves."""
    noise = np.random.default_rng(0).integers(0, 32, (HEIGHT * 3 // 2, WIDTH + 256), dtype=np.uint8)
    for number in range(count):
        shift = 3 * number % 256
        planes = noise[:, shift : shift + WIDTH] + ((np.arange(WIDTH) // 2 + number) % 180).astype(np.uint8)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), "yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, FPS)
        yield frame


def draw_audio(seconds: int, sample_format: str) -> Iterator[av.AudioFrame]:
    """Yield audio frames of a tone whose frequency changes."""
    moments = np.arange(seconds * RATE) / RATE
    samples = (0.3 * np.sin(2 * np.pi * (300 + 50 * np.sin(moments)) * moments)).astype(np.float32)
    if sample_format == "s16":
        samples = (samples * 32767).astype(np.int16)
    for start in range(0, len(samples), 1024):
        frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], sample_format, "mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
        yield frame


def write_clip(path: Path, gop: int | None, audio_codec: str = "aac", seconds: int = 60) -> Path:
    """Write audio, and video if it has a distance of key frames."""
    sample_format = "s16" if audio_codec in ("flac", "pcm_s16le") else "fltp"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"}) if gop else None
        audio = container.add_stream(audio_codec, rate=RATE, layout="mono", format=sample_format)
        if video and gop:
            video.width, video.height, video.pix_fmt, video.gop_size = WIDTH, HEIGHT, "yuv420p", gop
            for frame in itertools.chain(draw_frames(seconds * FPS), [None]):
                container.mux(video.encode(frame))
        for frame in itertools.chain(draw_audio(seconds, sample_format), [None]):
            container.mux(audio.encode(frame))
    return path


def write_folder(folder: Path, count: int, seconds: int) -> list[Path]:
    """Write different clips: all of one video without audio, each a second later than the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    # Exactly a key frame every second, so that each clip starts with one, and no frames that are shown out of order.
    options = {"preset": "veryfast", "bf": "0", "sc_threshold": "0"}
    with av.open(str(folder / "all.mkv"), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options=options)
        video.width, video.height, video.pix_fmt, video.gop_size = WIDTH, HEIGHT, "yuv420p", FPS
        for frame in itertools.chain(draw_frames((count + seconds) * FPS), [None]):
            container.mux(video.encode(frame))
    with av.open(str(folder / "all.mkv")) as source:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        stream = source.streams.video[0]
        content = [(packet.is_keyframe, bytes(packet)) for packet in packets]
        paths = [folder / f"{number}.mp4" for number in range(count)]
        for number, path in enumerate(paths):
            with av.open(str(path), "w") as target:
                copy = target.add_stream_from_template(stream)
                for index, (is_key, data) in enumerate(content[number * FPS : (number + seconds) * FPS]):
                    packet = av.Packet(data)
                    packet.stream, packet.time_base, packet.is_keyframe = copy, Fraction(1, FPS), is_key
                    packet.pts = packet.dts = index
                    packet.duration = 1
                    target.mux(packet)
    return paths


def read_with_pyav(path: Path, size: int, count: int | None = None) -> list[np.ndarray]:
    """Read frames with a bare PyAV loop: all of them, or `count` at equal distances up to the last."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        wanted = None if count is None else {*np.linspace(0, stream.frames - 1, count).astype(int).tolist()}
        return [
            frame.reformat(size, size, "rgb24", interpolation="BILINEAR").to_ndarray()
            for number, frame in enumerate(container.decode(stream))
            if wanted is None or number in wanted
        ]
