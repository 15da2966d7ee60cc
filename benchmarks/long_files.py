"""Compare reading a file of two hours with one of ten seconds.

    python benchmarks/long_files.py
    python benchmarks/long_files.py --answers      # and `vllama chat` with the miniature, from start to answer

Files are made on the spot: the packets of one minute (H.264 of 320 × 180 pixels at 25 frames per second, AAC) are
repeated with new timestamps. Each reading is measured in a process of its own, which has read a short file before, so
that imports do not count. Times are the smallest of five. CPU time, of all threads, depends less on other processes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
from clips import RATE, draw_audio, write_clip

SHORT, LONG = 10, 7200  # seconds
GROUPS = {"mp4, a key frame every second": ("mp4", 25), "mp4, every 10 s": ("mp4", 250)}
GROUPS |= {"mkv, every second": ("mkv", 25), "mpegts, every second": ("ts", 25)}
AUDIO = {"m4a": "aac", "mp3": "libmp3lame", "flac": "flac", "wav": "pcm_s16le"}

CHILD = """
import json, sys, time
from vllama_jax import media
warm_up, path = sys.argv[1:]
media.read_media(warm_up, num_clips=8)
times, cpu_times = [], []
for _ in range(5):
    start, cpu_start = time.perf_counter(), time.process_time()
    media.read_media(path, num_clips=8)
    times.append(time.perf_counter() - start)
    cpu_times.append(time.process_time() - cpu_start)
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(json.dumps([min(times), min(cpu_times), peak / 1024]))
"""


def repeat_minute(minute: Path, path: Path, seconds: int) -> Path:
    """Write the packets of a minute again and again, with new timestamps, as a file of `seconds` seconds."""
    with av.open(str(minute)) as source, av.open(str(path), "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        packets = [packet for packet in source.demux() if packet.size and packet.pts is not None]
        packets.sort(key=lambda packet: packet.dts * packet.time_base)
        content = [(p.stream.index, p.pts, p.dts, p.duration, p.time_base, p.is_keyframe, bytes(p)) for p in packets]
        first, last = ({row[0]: row for row in rows} for rows in (reversed(content), content))
        periods = {index: last[index][2] - first[index][2] + first[index][3] for index in first}
        for number in range(-(-seconds // 60)):
            for index, pts, dts, duration, unit, is_key, data in content:
                shift = number * periods[index]
                if (dts + shift) * unit < seconds:
                    packet = av.Packet(data)
                    packet.stream, packet.time_base, packet.is_keyframe = streams[index], unit, is_key
                    packet.pts, packet.dts, packet.duration = pts + shift, dts + shift, duration
                    target.mux(packet)
    return path


def write_flac(path: Path, seconds: int) -> Path:
    """Encode all of a FLAC file, whose packets have their number in them."""
    with av.open(str(path), "w") as container:
        audio = container.add_stream("flac", rate=RATE, layout="mono", format="s16")
        minute = list(draw_audio(min(seconds, 60), "s16"))
        for number in range(-(-seconds // 60)):
            for frame in minute:
                frame.pts = None if number else frame.pts
                container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path


def make_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Write a short and a long file of each kind."""
    files = {}
    for name, (ending, gop) in GROUPS.items():
        minute = write_clip(folder / f"minute_{gop}.mp4", gop)
        both = [folder / f"{seconds}_{gop}.{ending}" for seconds in (SHORT, LONG)]
        files[name] = tuple(repeat_minute(minute, path, s) for path, s in zip(both, (SHORT, LONG), strict=True))
    for ending, codec in AUDIO.items():
        both = [folder / f"{seconds}.{ending}" for seconds in (SHORT, LONG)]
        if ending == "flac":
            files[ending] = tuple(write_flac(path, s) for path, s in zip(both, (SHORT, LONG), strict=True))
            continue
        minute = write_clip(folder / f"minute.{ending}", None, codec)
        files[ending] = tuple(repeat_minute(minute, path, s) for path, s in zip(both, (SHORT, LONG), strict=True))
    return files


def measure_reading(warm_up: Path, path: Path) -> tuple[float, float, float]:
    """Return the seconds, the CPU seconds and the peak memory in MB of reading eight frames and eight audio clips."""
    command = [sys.executable, "-c", CHILD, str(warm_up), str(path)]
    return tuple(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def measure_answer(path: Path) -> float:
    """Return the seconds that `vllama chat` takes for an answer about a file, from its start."""
    command = [sys.executable, "-m", "vllama_jax", "chat", str(path), "What happens?", "--max-new-tokens", "20"]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def compare_lengths(folder: Path, answers: bool) -> None:
    """Print the times and the memory of long files and of short ones."""
    print("| file | 10 s | 2 hours | ratio | ratio of CPU time | additional memory |\n|---|---|---|---|---|---|")
    for name, (short, long) in make_files(folder).items():
        (short_time, short_cpu, short_memory), (long_time, long_cpu, long_memory) = (
            measure_reading(short, path) for path in (short, long)
        )
        figures = f"{short_time:.2f} s | {long_time:.2f} s | {long_time / short_time:.1f} | {long_cpu / short_cpu:.1f}"
        print(f"| {name} | {figures} | {long_memory - short_memory:.0f} MB |", flush=True)
        if answers and short.suffix == ".mp4":
            short_time, long_time = measure_answer(short), measure_answer(long)
            figures = f"{short_time:.2f} s | {long_time:.2f} s | {long_time / short_time:.1f}"
            print(f"| {name}, to the answer of `vllama chat` | {figures} | | |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", action="store_true", help="also measure `vllama chat`, from start to answer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        compare_lengths(Path(name), options.answers)


if __name__ == "__main__":
    main()
