"""Measure `vllama convert` at published sizes: time, peak memory, and speed relative to tensorstore and cp.

    python benchmarks/convert.py [--components llama eva_vit blip2 imagebind] [--layers 4] [--rounds 3]
        [--then verify load]

Each component is converted from random weights of its published size, dtype and file format, with tiny weights of the
other components. A bare tensorstore write of the same arrays and `cp` of the files alternate with it. All three wait
until the files are on the disk (`sync` after cp). The files to read are dropped from the page cache first, unless
--warm is given. Times include the start of the process, except tensorstore's, which are of the writes alone. Needs
three times the component's size on the disk, in a temporary folder.
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

Component = Literal["llama", "llama_bin", "llama_13b", "eva_vit", "blip2", "imagebind"]
Command = Literal["verify", "export", "load"]

FILES = {
    "eva_vit": "eva_vit_g.pth",
    "blip2": "blip2_pretrained_flant5xxl.pth",
    "imagebind": "imagebind_huge.pth",
    "vl": "vl.pth",
    "al": "al.pth",
}
DTYPES = {"llama": ml_dtypes.bfloat16, "eva_vit": np.float16}  # of published files; float32 in the others
UNUSED_TENSORS = {  # name and size of tensors that published files have and conversion ignores
    "eva_vit": ("blocks.39.rest", 25_300_000),
    "blip2": ("t5_proj.weight", 768 * 4096),
    "imagebind": ("modality_trunks.text.rest", 1_200_781_057 - 719_065_088),
}
WRAPPED = ("blip2", "vl", "al")  # files with the layout {"model": tensors}
SHARD_BYTES = 5e9
NOISE = 2**25  # random numbers that tensors are sliced from
ROWS_AHEAD = 4  # pending tensorstore writes
LOAD = """
import sys, jax, vllama_jax as vl
jax.block_until_ready(jax.tree.leaves(vl.load(sys.argv[1], sys.argv[2]).network))
"""


# Source files.


def make_config(component: Component, layers: int | None) -> VideoLlamaConfig:
    """Return a tiny config in which one component has its published size, or at most `layers` layers."""

    def limit_depth(full):
        return dataclasses.replace(full, depth=min(full.depth, layers or full.depth))

    towers = {"audio": limit_depth(IMAGEBIND_HUGE.audio), "vision": limit_depth(IMAGEBIND_HUGE.vision)}
    full = {
        "llama": {"llama": limit_depth(LLAMA_7B)},
        "llama_bin": {"llama": limit_depth(LLAMA_7B)},
        "llama_13b": {"llama": limit_depth(LLAMA_13B)},
        "eva_vit": {"vit": limit_depth(EVA_G)},
        "blip2": {"image_qformer": BLIP2_QFORMER, "vit": dataclasses.replace(EVA_G, depth=1, mlp_dim=64)},
        "imagebind": {"imagebind": dataclasses.replace(IMAGEBIND_HUGE, **towers)},
    }
    return dataclasses.replace(tiny(), **full[component])


def write_sources(folder: Path, component: Component, layers: int | None) -> None:
    """Write a Hugging Face directory llama/, `.pth` files of the other components, and config.json."""
    config, noise = make_config(component, layers), np.random.default_rng(0).standard_normal(NOISE, np.float32)
    (folder / "llama").mkdir(parents=True)
    write_overrides(folder / "config.json", config)
    write_llama_config(folder / "llama" / "config.json", config)
    train_tokenizer(folder / "llama")
    shapes = file_shapes(config)
    if component in UNUSED_TENSORS:
        name, count = UNUSED_TENSORS[component]
        shapes[component][name] = (count,)
    for kind in ("llama", *FILES):
        values = noise.astype(DTYPES.get(kind, np.float32))
        tensors = [random_tensor(name, shape, values) for name, shape in shapes[kind].items()]
        if kind == "llama":
            write_shards(folder / "llama", tensors, torch=component == "llama_bin")
        else:
            write_torch(folder / FILES[kind], tensors, kind in WRAPPED, lambda done: None)


def random_tensor(name: str, shape: tuple[int, ...], noise: np.ndarray) -> Tensor:
    """Make a tensor of a slice of `noise` that depends on the name; larger tensors repeat it."""
    count, start = math.prod(shape), zlib.crc32(name.encode()) % (NOISE // 2)

    def read() -> np.ndarray:
        fits = start + count <= NOISE
        return noise[start : start + count].reshape(shape) if fits else np.resize(noise[start:], shape)

    return Tensor(name, shape, noise.dtype, read)


def write_shards(folder: Path, tensors: Sequence[Tensor], *, torch: bool) -> None:
    """Write shards layer by layer, as published, with their index."""
    shards: list[list[Tensor]] = [[]]
    for tensor in sorted(tensors, key=lambda tensor: [int(word) for word in tensor.name.split(".") if word.isdigit()]):
        if sum(other.nbytes for other in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    stem, suffix = ("pytorch_model", "bin") if torch else ("model", "safetensors")
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        if torch:
            write_torch(folder / name, shard, False, lambda done: None)
        else:
            write_safetensors(folder / name, shard, lambda done: None)
        weight_map |= {tensor.name: name for tensor in shard}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


# Measurements.


@dataclasses.dataclass(frozen=True)
class Process:
    """The time and the peak memory of a finished process."""

    seconds: float
    peak_mb: float


def run(*command: str | Path) -> Process:
    """Run a process and measure its time and peak resident memory.

    The peak is read from /proc (Linux), as ru_maxrss of a child includes the memory of its parent.
    """
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = next((int(line.split()[1]) for line in status if line.startswith("VmHWM:")), peak)
            time.sleep(0.02)
    if process.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return Process(time.perf_counter() - start, peak * 1024 / 1e6)


def vllama(*arguments: str | Path) -> Process:
    """Run a vllama command."""
    return run(Path(sys.executable).with_name("vllama"), *arguments)


def convert(sources: Path, out: Path, warm: bool) -> Process:
    """Run `vllama convert` on the source files."""
    options = {f"--{kind.replace('_', '-')}": sources / name for kind, name in FILES.items()}
    options |= {"--llama": sources / "llama", "--config": sources / "config.json", "--out": out}
    if not warm:
        drop_page_cache(sources)
    return vllama("convert", *(word for option in options.items() for word in option))


def copy(sources: Path, out: Path, warm: bool) -> float:
    """Copy the source files with cp and sync, and return the seconds."""
    if not warm:
        drop_page_cache(sources)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", sources, out], check=True)
    subprocess.run(["sync", *list_files(out)], check=True)
    return time.perf_counter() - start


def write_bare(arrays: Sequence[dict], out: Path) -> float:
    """Write random arrays with tensorstore, with the shapes, dtypes and chunks of `arrays`, and return the seconds."""
    sizes = [math.prod(array["shape"][1:]) * array["chunks"][0] * 4 for array in arrays]
    noise, writes = np.frombuffer(np.random.default_rng(0).bytes(max(sizes)), np.uint8), collections.deque()
    start = time.perf_counter()
    for number, array in enumerate(arrays):
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(out / str(number))}, "metadata": array}
        store = tensorstore.open(spec, create=True).result()
        for first in range(0, array["shape"][0], array["chunks"][0]):
            rows = store[first : min(first + array["chunks"][0], array["shape"][0])]
            writes.append(rows.write(np.ndarray(rows.shape, rows.dtype.numpy_dtype, noise)))
            if len(writes) > ROWS_AHEAD:
                writes.popleft().result()
    for write in writes:
        write.result()
    return time.perf_counter() - start


def list_files(folder: Path) -> list[Path]:
    """List all files below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def get_size_mb(folder: Path) -> float:
    """Return the size of all files below a folder in MB."""
    return sum(file.stat().st_size for file in list_files(folder)) / 1e6


def drop_page_cache(folder: Path) -> None:
    """Drop the files below a folder from the page cache."""
    for path in list_files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    component: Component, layers: int | None, rounds: int, warm: bool, then: Sequence[Command], folder: Path
) -> None:
    """Measure the conversion of a component, and print medians with the values of all rounds."""
    sources, model, other = folder / "sources", folder / "model", folder / "other"
    write_sources(sources, component, layers)
    results: dict[str, list[float]] = collections.defaultdict(list)

    def measure_convert() -> None:
        shutil.rmtree(model, ignore_errors=True)
        process = convert(sources, model, warm)
        results["seconds"].append(process.seconds)
        results["peak MB"].append(process.peak_mb)
        results["MB/s"].append(get_size_mb(model) / process.seconds)

    def measure_tensorstore() -> None:
        arrays = [json.loads(path.read_text()) for path in sorted((model / "params").rglob(".zarray"))]
        results["tensorstore MB/s"].append(get_size_mb(model) / write_bare(arrays, other))
        shutil.rmtree(other)

    def measure_copy() -> None:
        results["cp MB/s"].append(get_size_mb(sources) / copy(sources, other, warm))
        shutil.rmtree(other)

    steps = collections.deque([measure_convert, measure_tensorstore, measure_copy])
    for _ in range(rounds):
        for step in steps:
            step()
        steps.rotate()
    for name in ("tensorstore", "cp"):
        ratios = zip(results["MB/s"], results[f"{name} MB/s"], strict=True)
        results[f"relative to {name}"] = [ours / theirs for ours, theirs in ratios]
    print(f"{component}: {get_size_mb(sources):.0f} MB read, {get_size_mb(model):.0f} MB written")
    for name, values in results.items():
        print(f"  {name:24}{statistics.median(values):8.4g}   {'  '.join(f'{value:.4g}' for value in values)}")
    shutil.rmtree(sources)
    for name in then:
        measure_command(name, model, other)


def measure_command(name: Command, model: Path, other: Path) -> None:
    """Measure a command on the model directory once."""
    drop_page_cache(model)
    if name == "load":
        for dtype in ("bfloat16", "float32"):
            report(f"load in {dtype}", run(sys.executable, "-c", LOAD, model, dtype), get_size_mb(model))
    elif name == "export":
        report(name, vllama("export", model, "--out", other), get_size_mb(model))
        shutil.rmtree(other)
    else:
        report(name, vllama("verify", model), get_size_mb(model))


def report(name: str, process: Process, size: float) -> None:
    """Print the time, the peak memory and the speed of a process."""
    print(f"  {name}: {process.seconds:.1f} s, peak {process.peak_mb:.0f} MB, {size / process.seconds:.0f} MB/s")


def main(
    components: tuple[Component, ...] = ("llama", "eva_vit", "blip2", "imagebind"),
    layers: int | None = None,
    rounds: int = 3,
    warm: bool = False,
    then: tuple[Command, ...] = (),
    scratch: Path = Path(),
) -> None:
    """Measure the conversion of components at their published sizes.

    Args:
        components: The components to measure. llama_bin is llama as PyTorch files.
        layers: The maximum number of layers of a component.
        rounds: The number of rounds, of which the median is printed.
        warm: Keep the source files in the page cache, as after a download.
        then: Commands to measure once on the converted model.
        scratch: The directory of the temporary folder.
    """
    for component in components:
        with tempfile.TemporaryDirectory(dir=scratch, prefix="convert-") as folder:
            measure(component, layers, rounds, warm, then, Path(folder))


if __name__ == "__main__":
    tyro.cli(main)
