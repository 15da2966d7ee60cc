"""Read mutated media files, each in a separate process: `python tests/fuzz_media.py OUT.jsonl --seed 0 --count 300`.

Writes one line for each file: the mutation, the outcome, CPU seconds and memory. tests/test_fuzz_media.py checks them.
"""

import argparse
import json
import os
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import av.sidedata.sidedata  # noqa: F401  - once, before processes are forked
import media_fixtures
import numpy as np
from PIL import Image

from vllama_jax import media
from vllama_jax.errors import MediaError

CPU_SECONDS = 30
ADDRESS_SPACE = 6 << 30  # bytes; protects the machine: what tests check is the memory in use, which is measured
VPX = {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}}
VIDEOS = {
    "mp4": {"sound_rate": 16000},
    "mov": {"sound_rate": 16000, "muxer": {"movflags": "faststart"}},
    "fragmented.mp4": {"sound_rate": 16000, "muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "mkv": {"sound_rate": 16000},
    "webm": VPX,
    "avi": {"codec": "mpeg4"},
    "ts": {"sound_rate": 16000},
    "flv": {"sound_rate": 44100},
}
AUDIO = {"wav": ("pcm_s16le", "s16"), "mp3": ("libmp3lame", "fltp"), "flac": ("flac", "s16"), "m4a": ("aac", "fltp")}
IMAGES = ("jpg", "png", "webp", "tif")
SECONDS = 3.0  # of every video and audio file; animations have 8 frames of 0.1 s


def originals(folder: Path) -> dict[str, bytes]:
    """Write one file of every format."""
    for ending, settings in VIDEOS.items():
        settings = dict(settings)
        rate = settings.pop("sound_rate", None)
        samples = None if rate is None else media_fixtures.tone(SECONDS, rate)
        media_fixtures.write_video(folder / f"a.{ending}", 75, waveform=samples, rate=rate or 16000, **settings)
    for ending, (codec, form) in AUDIO.items():
        media_fixtures.write_audio(folder / f"a.{ending}", media_fixtures.tone(SECONDS, 16000), 16000, codec, form)
    noise = np.random.default_rng(0).integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(frame) for frame in noise]
    for ending in IMAGES:
        images[0].save(folder / f"a.{ending}")
    for ending, kind in (("gif", "gif"), ("apng", "png")):
        images[0].save(folder / f"a.{ending}", kind, save_all=True, append_images=images[1:], duration=100)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def flip_bytes(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(0, len(data), int(rng.integers(1, 40))):
        changed[place] ^= int(rng.integers(1, 256))
    return bytes(changed)


def change_header(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Write extreme numbers into a few fields of the first 1,000 bytes, or of the last for an index at the end."""
    changed = bytearray(data)
    reach = min(len(data) - 8, 1000)
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(4, reach))
        place = place if rng.random() < 0.7 else len(data) - place
        width = int(rng.choice([1, 2, 4, 8]))
        number = (
            int(rng.choice([0, 1, 0x7F, 0x80, 0xFF])) if width == 1 else int(rng.choice([0, 1, 2 ** (8 * width - 1)]))
        )
        number = number if rng.random() < 0.7 else 2 ** (8 * width) - 1
        changed[place : place + width] = number.to_bytes(width, "big" if rng.random() < 0.5 else "little")
    return bytes(changed[: len(data)])


def truncate(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    return data[: max(int(len(data) * rng.random() ** 0.5), 1)]


def zero_block(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    start, end = _block(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def remove_block(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    start, end = _block(data, rng)
    return data[:start] + data[end:]


def repeat_block(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    start, end = _block(data, rng)
    return data[:end] + data[start:end] + data[end:]


def join(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    return data + other


def keep(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    return data


MUTATIONS: tuple[Callable[[bytes, np.random.Generator, bytes], bytes], ...] = (
    *(flip_bytes, change_header, change_header, truncate, zero_block, remove_block, repeat_block, join, keep),
)


def _block(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    start = int(rng.integers(0, len(data)))
    return start, min(start + int(rng.integers(1, max(len(data) // 5, 2))), len(data))


def mutated(folder: Path, seed: int, count: int) -> Iterator[tuple[dict, bytes]]:
    """Yield a description and the bytes of each mutated file, cycling through formats and mutations."""
    files = originals(folder)
    names = list(files)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        name = names[number % len(names)]
        mutation = MUTATIONS[(number // len(names) + number) % len(MUTATIONS)]
        other = files[name if rng.random() < 0.5 else str(rng.choice(names))]
        made = {"number": number, "original": name, "mutation": mutation.__name__}
        yield made, mutation(files[name], rng, other)


def read(path: Path) -> dict:
    """Read a file as a chat does, check the invariants of the result, and return the outcome."""
    try:
        found = media.read_media(path)
        waveform = getattr(found, "waveform", None)
        mel = None if waveform is None else media.mel_clips(waveform, found.sample_rate)
    except MediaError as error:
        one_line = str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
        return {"outcome": "refused" if one_line else "unclear", "message": str(error)}
    report = found.report
    faults = []
    if report.kind != "audio":
        frames = media.normalize(found.frames)
        faults += ["frames"] * (frames.shape != (report.num_frames, 224, 224, 3) or not 1 <= report.num_frames <= 8)
    if report.kind == "video":
        times = found.timestamps
        faults += ["timestamps"] * (len(times) != report.num_frames or not np.isfinite(times).all())
        faults += ["order of timestamps"] * bool(
            (np.diff(times) < 0).any() or times[0] < 0 or times[-1] > found.duration
        )
    if mel is not None:
        faults += ["mel"] * (mel.shape != (8, 128, 204) or not np.isfinite(mel).all())
    faults += ["report"] * (not np.isfinite(report.duration) or len(str(report).splitlines()) != 1)
    outcome = {"outcome": "wrong: " + ", ".join(faults) if faults else "accepted", "message": str(report)}
    return outcome | {
        "kind": report.kind,
        "seconds": float(report.duration),
        "audio": report.audio,
        "notes": report.notes,
    }


def read_in_a_process(path: Path) -> dict:
    """Read a file in a forked process; add how the process ended and the resources it used."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        signal.alarm(20 * CPU_SECONDS)
        try:
            output = read(path)
        except BaseException:
            output = {"outcome": "traceback", "message": traceback.format_exc()}
        os.write(send, json.dumps(output).encode()[:60_000])
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as answer:
        output = answer.read()
    _, status, used = os.wait4(child, 0)
    outcome = json.loads(output) if output else {"outcome": "crash", "message": f"wait status {status}"}
    return outcome | {"cpu": used.ru_utime + used.ru_stime, "bytes": used.ru_maxrss * 1024}


def warm_up() -> None:
    """Import and compute once what every reader needs, before processes are forked."""
    Image.init()
    for rate in (16000, 44100, 48000):
        media.mel_clips(media_fixtures.tone(0.5, rate), rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--keep", type=Path, help="folder for the files that fail")
    settings = parser.parse_args()
    warm_up()
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as folder, settings.out.open("w") as out:
        for file, data in mutated(Path(made), settings.seed, settings.count):
            path = Path(folder) / f"{file['number']:04}_{file['mutation']}_{file['original']}"
            path.write_bytes(data)
            result = file | {"size": len(data)} | read_in_a_process(path)
            out.write(json.dumps(result) + "\n")
            out.flush()
            if settings.keep and result["outcome"] not in ("accepted", "refused"):
                (settings.keep / path.name).write_bytes(data)
            path.unlink()


if __name__ == "__main__":
    main()
