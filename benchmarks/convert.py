"""Published sizes converted: seconds, peak memory, and speed beside a bare tensorstore write and cp in turn with it.

    python benchmarks/convert.py [--parts llama eva_vit blip2 imagebind] [--layers 4] [--rounds 3] [--also verify load]

Each part is converted by `vllama convert` from random weights of its published size, dtype and format, with tiny ones
of the others. The converter waits until each file is on the disk; so does tensorstore, and cp is followed by `sync` of
its files. What is read is dropped from the page cache first, unless --warm. Seconds are of whole processes, but those
of tensorstore of the writing alone. Takes three times a part's size on the disk, in a folder that goes at the end.
"""

import collections
import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import tensorstore
import tyro

from vllama_jax.config import BLIP2_QFORMER, EVA_G, IMAGEBIND_HUGE, LLAMA_7B, LLAMA_13B, VideoLlamaConfig, tiny
from vllama_jax.convert.tiny import file_shapes, train_tokenizer, write_llama_config, write_overrides
from vllama_jax.convert.write_tensors import Tensor, write_safetensors, write_torch

Part = Literal["llama", "llama_bin", "llama_13b", "eva_vit", "blip2", "imagebind"]
Also = Literal["verify", "export", "load"]

FILES = {
    "eva_vit": "eva_vit_g.pth",
    "blip2": "blip2_pretrained_flant5xxl.pth",
    "imagebind": "imagebind_huge.pth",
    "vl": "vl.pth",
    "al": "al.pth",
}
DTYPES = {"llama": ml_dtypes.bfloat16, "eva_vit": np.float16}  # of published files; the others' is float32
NOT_READ = {  # what published files hold besides, in numbers
    "eva_vit": ("blocks.39.rest", 25_300_000),
    "blip2": ("t5_proj.weight", 768 * 4096),
    "imagebind": ("modality_trunks.text.rest", 1_200_781_057 - 719_065_088),
}
WRAPPED = ("blip2", "vl", "al")  # {"model": tensors}
SHARD_BYTES = 5e9
NOISE = 2**25  # random numbers, of which tensors are cut
ROWS_AHEAD = 4  # handed to tensorstore and not yet on the disk
LOAD = """
import sys, jax, vllama_jax as vl
jax.block_until_ready(jax.tree.leaves(vl.load(sys.argv[1], sys.argv[2]).network))
"""


# What is converted.


def sized(part: Part, layers: int | None) -> VideoLlamaConfig:
    """A tiny model but for one part, which has its published size, or at most so many layers."""

    def cut(full):
        return dataclasses.replace(full, depth=min(full.depth, layers or full.depth))

    towers = {"audio": cut(IMAGEBIND_HUGE.audio), "vision": cut(IMAGEBIND_HUGE.vision)}
    full = {
        "llama": {"llama": cut(LLAMA_7B)},
        "llama_bin": {"llama": cut(LLAMA_7B)},
        "llama_13b": {"llama": cut(LLAMA_13B)},
        "eva_vit": {"vit": cut(EVA_G)},
        "blip2": {"image_qformer": BLIP2_QFORMER, "vit": dataclasses.replace(EVA_G, depth=1, mlp_dim=64)},
        "imagebind": {"imagebind": dataclasses.replace(IMAGEBIND_HUGE, **towers)},
    }
    return dataclasses.replace(tiny(), **full[part])


def write_sources(folder: Path, part: Part, layers: int | None) -> None:
    """A Hugging Face directory llama/, the others' `.pth`, and config.json."""
    config, noise = sized(part, layers), np.random.default_rng(0).standard_normal(NOISE, np.float32)
    (folder / "llama").mkdir(parents=True)
    write_overrides(folder / "config.json", config)
    write_llama_config(folder / "llama" / "config.json", config)
    train_tokenizer(folder / "llama")
    shapes = file_shapes(config)
    if part in NOT_READ:
        name, count = NOT_READ[part]
        shapes[part][name] = (count,)
    for kind in ("llama", *FILES):
        values = noise.astype(DTYPES.get(kind, np.float32))
        tensors = [random_tensor(name, shape, values) for name, shape in shapes[kind].items()]
        if kind == "llama":
            write_shards(folder / "llama", tensors, torch=part == "llama_bin")
        else:
            write_torch(folder / FILES[kind], tensors, kind in WRAPPED, lambda done: None)


def random_tensor(name: str, shape: tuple[int, ...], noise: np.ndarray) -> Tensor:
    """Cut from `noise` at a place of its own; in a larger tensor that comes again."""
    count, start = math.prod(shape), zlib.crc32(name.encode()) % (NOISE // 2)

    def read() -> np.ndarray:
        fits = start + count <= NOISE
        return noise[start : start + count].reshape(shape) if fits else np.resize(noise[start:], shape)

    return Tensor(name, shape, noise.dtype, read)


def write_shards(folder: Path, tensors: Sequence[Tensor], *, torch: bool) -> None:
    """Layer by layer, as published, with their index."""
    shards: list[list[Tensor]] = [[]]
    for tensor in sorted(tensors, key=lambda tensor: [int(word) for word in tensor.name.split(".") if word.isdigit()]):
        if sum(held.nbytes for held in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    stem, suffix = ("pytorch_model", "bin") if torch else ("model", "safetensors")
    homes = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        if torch:
            write_torch(folder / name, shard, False, lambda done: None)
        else:
            write_safetensors(folder / name, shard, lambda done: None)
        homes |= {tensor.name: name for tensor in shard}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": homes}))


# What is measured.


@dataclasses.dataclass(frozen=True)
class Process:
    seconds: float
    peak_mb: float


def run(*command: str | Path) -> Process:
    """A process to its end. Its peak of resident memory is the kernel's (Linux); ru_maxrss would begin at ours."""
    begun, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = next((int(line.split()[1]) for line in status if line.startswith("VmHWM:")), peak)
            time.sleep(0.02)
    if process.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return Process(time.perf_counter() - begun, peak * 1024 / 1e6)


def vllama(*arguments: str | Path) -> Process:
    return run(Path(sys.executable).with_name("vllama"), *arguments)


def convert(sources: Path, out: Path, warm: bool) -> Process:
    options = {f"--{kind.replace('_', '-')}": sources / name for kind, name in FILES.items()}
    options |= {"--llama": sources / "llama", "--config": sources / "config.json", "--out": out}
    if not warm:
        forget(sources)
    return vllama("convert", *(word for option in options.items() for word in option))


def copy(sources: Path, out: Path, warm: bool) -> float:
    if not warm:
        forget(sources)
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", sources, out], check=True)
    subprocess.run(["sync", *files_in(out)], check=True)
    return time.perf_counter() - begun


def bare_write(arrays: Sequence[dict], out: Path) -> float:
    """Random rows of the arrays' shapes, dtypes and chunks, from memory to the disk."""
    sizes = [math.prod(array["shape"][1:]) * array["chunks"][0] * 4 for array in arrays]
    noise, writes = np.frombuffer(np.random.default_rng(0).bytes(max(sizes)), np.uint8), collections.deque()
    begun = time.perf_counter()
    for number, array in enumerate(arrays):
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(out / str(number))}, "metadata": array}
        store = tensorstore.open(spec, create=True).result()
        for first in range(0, array["shape"][0], array["chunks"][0]):
            part = store[first : min(first + array["chunks"][0], array["shape"][0])]
            writes.append(part.write(np.ndarray(part.shape, part.dtype.numpy_dtype, noise)))
            if len(writes) > ROWS_AHEAD:
                writes.popleft().result()
    for write in writes:
        write.result()
    return time.perf_counter() - begun


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def size_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in files_in(folder)) / 1e6


def forget(folder: Path) -> None:
    """Drops files from the page cache."""
    for path in files_in(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(part: Part, layers: int | None, rounds: int, warm: bool, also: Sequence[Also], folder: Path) -> None:
    sources, model, other = folder / "sources", folder / "model", folder / "other"
    write_sources(sources, part, layers)
    found: dict[str, list[float]] = collections.defaultdict(list)

    def converting() -> None:
        shutil.rmtree(model, ignore_errors=True)
        process = convert(sources, model, warm)
        found["seconds"].append(process.seconds)
        found["peak MB"].append(process.peak_mb)
        found["MB/s"].append(size_mb(model) / process.seconds)

    def writing() -> None:
        arrays = [json.loads(path.read_text()) for path in sorted((model / "params").rglob(".zarray"))]
        found["tensorstore's MB/s"].append(size_mb(model) / bare_write(arrays, other))
        shutil.rmtree(other)

    def copying() -> None:
        found["cp's MB/s"].append(size_mb(sources) / copy(sources, other, warm))
        shutil.rmtree(other)

    steps = collections.deque([converting, writing, copying])
    for _ in range(rounds):
        for step in steps:
            step()
        steps.rotate()
    for name in ("tensorstore", "cp"):
        ratios = zip(found["MB/s"], found[f"{name}'s MB/s"], strict=True)
        found[f"of {name}'s"] = [ours / theirs for ours, theirs in ratios]
    print(f"{part}: {size_mb(sources):.0f} MB read, {size_mb(model):.0f} MB written")
    for name, values in found.items():
        print(f"  {name:20}{statistics.median(values):8.4g}   {'  '.join(f'{value:.4g}' for value in values)}")
    shutil.rmtree(sources)
    for name in also:
        after(name, model, other)


def after(name: Also, model: Path, other: Path) -> None:
    """What is done with a model directory, once."""
    forget(model)
    if name == "load":
        for dtype in ("bfloat16", "float32"):
            report(f"load in {dtype}", run(sys.executable, "-c", LOAD, model, dtype), size_mb(model))
    elif name == "export":
        report(name, vllama("export", model, "--out", other), size_mb(model))
        shutil.rmtree(other)
    else:
        report(name, vllama("verify", model), size_mb(model))


def report(name: str, process: Process, size: float) -> None:
    print(f"  {name}: {process.seconds:.1f} s, peak {process.peak_mb:.0f} MB, {size / process.seconds:.0f} MB/s")


def main(
    parts: tuple[Part, ...] = ("llama", "eva_vit", "blip2", "imagebind"),
    layers: int | None = None,
    rounds: int = 3,
    warm: bool = False,
    also: tuple[Also, ...] = (),
    scratch: Path = Path(),
) -> None:
    """Args:
    parts: One after another. llama_bin is llama as torch's files.
    layers: Of the part at most.
    rounds: The median counts.
    warm: Leave in the page cache what is read, as after a download.
    also: What to do with the model then, once.
    scratch: Where the folder for all files is made.
    """
    for part in parts:
        with tempfile.TemporaryDirectory(dir=scratch, prefix="convert-") as folder:
            measure(part, layers, rounds, warm, also, Path(folder))


if __name__ == "__main__":
    tyro.cli(main)
