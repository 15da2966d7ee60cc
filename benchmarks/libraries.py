"""Compare the writers and readers of this package with libraries: time, CPU time and peak memory.

    python benchmarks/libraries.py [--gigabytes 0.9] [--rounds 3] [--folder /tmp]

`checkpoints/arrays.py` and tensorstore write and read the chunks of a stacked kernel of LLaMA-7B (10 layers of
4096 × 11008 in bfloat16 at 0.9 GB). A .pth file is written by `convert/write_tensors.py` and with torch.save in two
ways: from a memory-mapped file, and with `skip_data`, after which the file is filled through a memory map. Each method
runs in its own process, in turn. Peak memory is the increase after imports. docs/trials.md has the figures.
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
MAX_PENDING_WRITES = 2  # of half a layer each
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@functools.cache
def make_noise() -> np.ndarray:
    """Make the random numbers that layers are sliced from, once."""
    return np.random.default_rng(0).integers(0, 2**14, LAYER[0] * LAYER[1] + 64, dtype=np.uint16)


def make_layer(number: int) -> np.ndarray:
    """Make a layer of the kernel, uint16."""
    return make_noise()[number : number + LAYER[0] * LAYER[1]].copy().reshape(LAYER)


def make_blocks(layers: int) -> Iterator[np.ndarray]:
    """Yield the layers as bfloat16 [1, rows, columns]."""
    for number in range(layers):
        yield make_layer(number)[None].view(BFLOAT16)


def make_leaf(layers: int) -> dict:
    """Return the manifest's entry of the kernel."""
    return {"shape": [layers, *LAYER], "dtype": "bfloat16"}


def write_chunks_by_hand(folder: Path, layers: int) -> None:
    """Write chunks with `ParamsWriter`."""
    with ParamsWriter(folder / "params") as params:
        params.write("kernel", (layers, *LAYER), BFLOAT16, make_blocks(layers))


def open_stored(folder: Path, **options: object) -> tensorstore.TensorStore:
    """Open the kernel's zarr array with tensorstore."""
    kvstore = {"driver": "file", "path": f"{folder / 'params' / 'kernel'}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": kvstore, **options}).result()


def write_chunks_by_tensorstore(folder: Path, layers: int) -> None:
    """Write chunks with tensorstore, and hash them as `ParamsWriter` does."""
    shape = [layers, *LAYER]
    chunks = chunk_shape(shape, BFLOAT16.itemsize)
    metadata = {"shape": shape, "chunks": chunks, "dtype": "bfloat16", "compressor": None, "fill_value": None}
    array = open_stored(folder, metadata=metadata, create=True, store_data_equal_to_fill_value=True)
    digest, writes = xxhash.xxh3_128(), collections.deque()
    for number, block in enumerate(make_blocks(layers)):
        digest.update(block.view(np.uint8))
        for first in range(0, LAYER[0], chunks[1]):
            rows = slice(first, first + chunks[1])
            section = array[number : number + 1, rows]
            writes.append(section.write(block[:, rows], can_reference_source_data_indefinitely=True))
            while len(writes) > MAX_PENDING_WRITES:
                writes.popleft().result()
    for write in writes:
        write.result()


def read_chunks_by_hand(folder: Path, layers: int) -> None:
    """Read and hash chunks with `iter_row_blocks`."""
    digest = xxhash.xxh3_128()
    for block in iter_row_blocks(folder / "params", "kernel", make_leaf(layers)):
        digest.update(block.view(np.uint8))


def read_chunks_by_tensorstore(folder: Path, layers: int) -> None:
    """Read chunks with tensorstore and hash them."""
    array, digest = open_stored(folder, open=True, fill_missing_data_reads=False), xxhash.xxh3_128()
    for number in range(layers):
        digest.update(array[number : number + 1].read(order="C").result().view(np.uint8))


def write_pth_by_hand(folder: Path, layers: int) -> None:
    """Write a .pth file with `write_torch`."""

    def read(number: int) -> np.ndarray:
        return make_layer(number).view(np.float16)

    tensors = [Tensor(str(n), LAYER, np.dtype(np.float16), functools.partial(read, n)) for n in range(layers)]
    write_torch(folder / "model.pth", tensors, True, lambda done: None)


def write_pth_by_mapped_save(folder: Path, layers: int) -> None:
    """Write a .pth file with torch.save from tensors in a memory-mapped file."""
    import torch

    size = LAYER[0] * LAYER[1]
    raw = torch.from_file(str(folder / "raw"), shared=True, size=layers * size, dtype=torch.float16)
    for number in range(layers):
        raw[number * size : (number + 1) * size].numpy()[:] = make_layer(number).view(np.float16).ravel()
    torch.save({"model": {str(n): raw[n * size : (n + 1) * size].view(LAYER) for n in range(layers)}}, folder / "x.pth")
    _sync(folder / "x.pth")


def write_pth_by_skip_data(folder: Path, layers: int) -> None:
    """Write a .pth file with torch.save under `skip_data`, then fill it through a memory map."""
    import torch
    from torch._subclasses import FakeTensorMode
    from torch.serialization import set_default_mmap_options, skip_data

    with FakeTensorMode():
        placeholders = {str(number): torch.empty(LAYER, dtype=torch.float16) for number in range(layers)}
    with skip_data(materialize_fake_tensors=True):
        torch.save({"model": placeholders}, folder / "x.pth")
    with set_default_mmap_options(mmap.MAP_SHARED):
        tensors = torch.load(folder / "x.pth", mmap=True, weights_only=True)["model"]
    for number in range(layers):
        tensors[str(number)].numpy()[:] = make_layer(number).view(np.float16)
    _sync(folder / "x.pth")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


METHODS = {
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
    """The options of this script.

    Attributes:
        gigabytes: The size of each array.
        rounds: The number of rounds; each runs all methods in turn.
        folder: Where temporary files are written, on the disk to measure.
    """

    gigabytes: float = 0.9
    rounds: int = 3
    folder: Path = Path(tempfile.gettempdir())


def measure(method: str, folder: Path, layers: int) -> None:
    """Print the seconds, the CPU seconds and the MiB of one method, without imports."""
    if ".pth" in method:
        import torch  # noqa: F401
    make_noise()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    METHODS[method](folder, layers)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        json.dumps({"s": round(seconds, 2), "cpu_s": round(cpu, 2), "mib": (after.ru_maxrss - before.ru_maxrss) >> 10})
    )


def main(options: Options) -> None:
    """Run all methods in subprocesses, in turn, and print their figures."""
    layers = max(1, round(options.gigabytes * 1e9 / (LAYER[0] * LAYER[1] * 2)))
    for _ in range(options.rounds):
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            for method in METHODS:
                if "written" in method:
                    shutil.rmtree(folder / "params", ignore_errors=True)
                command = [sys.executable, __file__, "measure", method, str(folder), str(layers)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                print(f"{method:36} {done.stdout.strip()}", flush=True)
                for file in folder.glob("*.pth"):
                    file.unlink()
                (folder / "raw").unlink(missing_ok=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main(tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0]))
