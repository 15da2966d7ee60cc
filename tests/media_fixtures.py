"""Small media files, rendered when the tests run, so that their content is known and no binary file is stored."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

SIDE = 64
FPS = 25


def numbered_frame(number: int) -> av.VideoFrame:
    """Draw a frame of 8 vertical stripes, white or black: the binary digits of `number` (below 256), lowest first."""
    planes = np.full((SIDE * 3 // 2, SIDE), 128, np.uint8)
    planes[:SIDE] = np.where(number >> (np.arange(SIDE) * 8 // SIDE) & 1, 235, 16)
    return av.VideoFrame.from_ndarray(planes, "yuv420p")


def decode_frame_numbers(frames: np.ndarray) -> list[int]:
    """Decode the numbers of RGB frames [t, h, w, 3]."""
    stripes = frames.reshape(len(frames), frames.shape[1], 8, -1).mean(axis=(1, 3)) > 127
    return (stripes << np.arange(8)).sum(axis=1).tolist()


def tone(seconds: float, rate: int, channels: int = 2) -> np.ndarray:
    """Return float32 audio [channels, n]: a different sine in each channel, at half of full scale."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * 440 * (1 + channel) * time) for channel in range(channels)], dtype="f4")


def write_video(
    path: Path,
    num_frames: int = 150,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    waveform: np.ndarray | None = None,
    rate: int = 16000,
    audio_codec: str = "aac",
) -> Path:
    """Write a video of numbered frames with a key frame every 20, and optionally an audio stream (AAC or pcm_s16le)."""
    fast = {"preset": "ultrafast", "bf": "3"} if codec == "libx264" else {}
    with av.open(str(path), "w", options=muxer or {}) as container:
        video = container.add_stream(codec, rate=FPS, options=fast | (options or {}))
        video.width, video.height, video.pix_fmt, video.gop_size = SIDE, SIDE, "yuv420p", 20
        audio = None if waveform is None else container.add_stream(audio_codec, rate=rate, layout="stereo")
        container.start_encoding()
        for number in range(num_frames):
            frame = numbered_frame(number)
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio:
            for frame in _encode_frames(waveform, rate, "fltp" if audio_codec == "aac" else "s16"):
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def write_audio(
    path: Path,
    waveform: np.ndarray,
    rate: int,
    codec: str,
    sample_format: str,
    cover: bool = False,
    layout: str | None = None,
) -> Path:
    """Write float audio [c, n] with the given codec and sample format; `cover` adds cover art as music players do."""
    with av.open(str(path), "w") as container:
        layout = layout or ("stereo" if len(waveform) == 2 else "mono")
        audio = container.add_stream(codec, rate=rate, layout=layout, format=sample_format)
        if cover:
            image_file = container.add_stream("mjpeg")
            image_file.width, image_file.height, image_file.pix_fmt = SIDE, SIDE, "yuvj420p"
            image_file.disposition = av.stream.Disposition.attached_pic.value
            images = image_file.encode(numbered_frame(100).reformat(format="yuvj420p"))
        container.start_encoding()
        container.mux(images if cover else [])
        for frame in _encode_frames(waveform, rate, sample_format, layout):
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path


def _encode_frames(waveform: np.ndarray, rate: int, sample_format: str, layout: str = "stereo"):
    scales = {"u8": (128, 128, np.uint8), "s16": (32768, 0, np.int16), "s32": (2**31, 0, np.int32)}
    floats = {"flt": np.float32, "dbl": np.float64}
    kind = sample_format.removesuffix("p")
    for start in range(0, waveform.shape[1], 1024):
        chunk = waveform[:, start : start + 1024]
        if kind in scales:
            scale, offset, dtype = scales[kind]
            chunk = np.rint(chunk.astype(np.float64) * scale + offset).astype(dtype)
        else:
            chunk = chunk.astype(floats[kind])
        if not sample_format.endswith("p"):
            chunk = chunk.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(chunk), sample_format, layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        yield frame


def write_media(folder: Path) -> dict[str, Path]:
    """Write a video with audio, an image, an audio file, a short video without audio and a corrupt file; by stem."""
    write_video(folder / "video.mp4", num_frames=50, waveform=tone(2.5, 16000))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "image.png")
    write_audio(folder / "audio.wav", tone(4, 16000), 16000, "pcm_s16le", "s16")
    write_video(folder / "short.mp4", num_frames=5)
    (folder / "corrupt.mp4").write_bytes(b"\0" * 1000)
    return {path.stem: path for path in folder.iterdir()}


def set_display_matrix(path: Path, out: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Copy an mp4 and set the display matrix in its first track header (tkhd)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    out.write_bytes(data)
    return out


def corrupt_packets(path: Path, corrupt: Path, kind: str) -> Path:
    """Copy a file, with noise in the packets of one stream type ("audio", "video") from packet 60 on."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(**{kind: 0}) if packet.size]
    noise = np.random.default_rng(0)
    for packet in packets[60:]:
        data[packet.pos : packet.pos + packet.size] = noise.bytes(packet.size)
    corrupt.write_bytes(data)
    return corrupt


def run_and_measure(code: str, *args: str) -> tuple[str, list[float]]:
    """Run Python code in a separate process, where `peak()` prints the peak memory so far in MB.

    Returns the text and the peaks. Output on stderr is an error.
    """
    peak = "def peak(): print('peak', int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024)"
    run = subprocess.run([sys.executable, "-c", f"{peak}\n{code}", *args], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    peaks = [float(line.split()[1]) for line in lines if line.startswith("peak ")]
    return "\n".join(line for line in lines if not line.startswith("peak ")), peaks
