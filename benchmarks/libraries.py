"""Libraries beside what is written by hand, on this machine: seconds, CPU seconds and peak memory of each.

    python benchmarks/libraries.py [--gigabytes 0.9] [--rounds 3] [--folder /tmp]

Chunks of a stacked kernel of LLaMA-7B (10 layers of 4096 × 11008 in bfloat16 at 0.9 GB) are written and read by
`checkpoints/arrays.py` and by tensorstore; a .pth file by `convert/write_tensors.py` and by two ways with torch.save:
from a memory-mapped file, and with `skip_data` and a map of the file that it left room in. Each runs in a process of
its own, in turn. Peak memory is what the work adds after imports. docs/trials.md has the figures.
"""

import collections
import dataclasses
import functools
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore
import tyro
import xxhash

from vllama_jax.checkpoints.arrays import ParamsWriter, chunk_shape, iter_row_blocks
from vllama_jax.convert.write_tensors import Tensor, write_torch

LAYER = (4096, 11008)
AHEAD = 2  # writes that tensorstore has at once, of half a layer each
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@functools.cache
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**14, LAYER[0] * LAYER[1] + 64, dtype=np.uint16)


def layer(number: int) -> np.ndarray:
    return noise()[number : number + LAYER[0] * LAYER[1]].copy().reshape(LAYER)


def blocks(layers: int) -> Iterator[np.ndarray]:
    for number in range(layers):
        yield layer(number)[None].view(BFLOAT16)


def leaf(layers: int) -> dict:
    return {"shape": [layers, *LAYER], "dtype": "bfloat16"}


def write_chunks_by_hand(folder: Path, layers: int) -> None:
    with ParamsWriter(folder / "params") as params:
        params.write("kernel", (layers, *LAYER), BFLOAT16, blocks(layers))


def stored(folder: Path, **options: object) -> tensorstore.TensorStore:
    kvstore = {"driver": "file", "path": f"{folder / 'params' / 'kernel'}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": kvstore, **options}).result()


def write_chunks_by_tensorstore(folder: Path, layers: int) -> None:
    shape = [layers, *LAYER]
    chunks = chunk_shape(shape, BFLOAT16.itemsize)
    metadata = {"shape": shape, "chunks": chunks, "dtype": "bfloat16", "compressor": None, "fill_value": None}
    array = stored(folder, metadata=metadata, create=True, store_data_equal_to_fill_value=True)
    digest, writes = xxhash.xxh3_128(), collections.deque()
    for number, block in enumerate(blocks(layers)):
        digest.update(block.view(np.uint8))
        for first in range(0, LAYER[0], chunks[1]):
            rows = slice(first, first + chunks[1])
            part = array[number : number + 1, rows]
            writes.append(part.write(block[:, rows], can_reference_source_data_indefinitely=True))
            while len(writes) > AHEAD:
                writes.popleft().result()
    for write in writes:
        write.result()


def read_chunks_by_hand(folder: Path, layers: int) -> None:
    digest = xxhash.xxh3_128()
    for block in iter_row_blocks(folder / "params", "kernel", leaf(layers)):
        digest.update(block.view(np.uint8))


def read_chunks_by_tensorstore(folder: Path, layers: int) -> None:
    array, digest = stored(folder, open=True, fill_missing_data_reads=False), xxhash.xxh3_128()
    for number in range(layers):
        digest.update(array[number : number + 1].read(order="C").result().view(np.uint8))


def write_pth_by_hand(folder: Path, layers: int) -> None:
    def read(number: int) -> np.ndarray:
        return layer(number).view(np.float16)

    tensors = [Tensor(str(n), LAYER, np.dtype(np.float16), functools.partial(read, n)) for n in range(layers)]
    write_torch(folder / "model.pth", tensors, True, lambda done: None)


def write_pth_by_mapped_save(folder: Path, layers: int) -> None:
    import torch

    size = LAYER[0] * LAYER[1]
    raw = torch.from_file(str(folder / "raw"), shared=True, size=layers * size, dtype=torch.float16)
    for number in range(layers):
        raw[number * size : (number + 1) * size].numpy()[:] = layer(number).view(np.float16).ravel()
    torch.save({"model": {str(n): raw[n * size : (n + 1) * size].view(LAYER) for n in range(layers)}}, folder / "x.pth")
    _sync(folder / "x.pth")


def write_pth_by_skip_data(folder: Path, layers: int) -> None:
    import torch
    from torch._subclasses import FakeTensorMode
    from torch.serialization import set_default_mmap_options, skip_data

    with FakeTensorMode():
        room = {str(number): torch.empty(LAYER, dtype=torch.float16) for number in range(layers)}
    with skip_data(materialize_fake_tensors=True):
        torch.save({"model": room}, folder / "x.pth")
    with set_default_mmap_options(mmap.MAP_SHARED):
        tensors = torch.load(folder / "x.pth", mmap=True, weights_only=True)["model"]
    for number in range(layers):
        tensors[str(number)].numpy()[:] = layer(number).view(np.float16)
    _sync(folder / "x.pth")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


WAYS = {
    "chunks written by hand": write_chunks_by_hand,
    "chunks read by hand": read_chunks_by_hand,
    "chunks written by tensorstore": write_chunks_by_tensorstore,
    "chunks read by tensorstore": read_chunks_by_tensorstore,
    ".pth by hand": write_pth_by_hand,
    ".pth by torch.save of a mapped file": write_pth_by_mapped_save,
    ".pth by torch.save with skip_data": write_pth_by_skip_data,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """gigabytes: of each array. rounds: of all ways in turn. folder: on the disk that is meant."""

    gigabytes: float = 0.9
    rounds: int = 3
    folder: Path = Path(tempfile.gettempdir())


def measure(way: str, folder: Path, layers: int) -> None:
    """Print seconds, CPU seconds and MiB of one way; imports come before."""
    if ".pth" in way:
        import torch  # noqa: F401
    noise()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    WAYS[way](folder, layers)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        json.dumps({"s": round(seconds, 2), "cpu_s": round(cpu, 2), "mib": (after.ru_maxrss - before.ru_maxrss) >> 10})
    )


def main(options: Options) -> None:
    layers = max(1, round(options.gigabytes * 1e9 / (LAYER[0] * LAYER[1] * 2)))
    for _ in range(options.rounds):
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            for way in WAYS:
                if "written" in way:
                    shutil.rmtree(folder / "params", ignore_errors=True)
                command = [sys.executable, __file__, "measure", way, str(folder), str(layers)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                print(f"{way:36} {done.stdout.strip()}", flush=True)
                for file in folder.glob("*.pth"):
                    file.unlink()
                (folder / "raw").unlink(missing_ok=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main(tyro.cli(Options, description=__doc__))
