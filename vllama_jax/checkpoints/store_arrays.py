"""Arrays on object stores, in the layout of `checkpoints/arrays.py`, of which each host reads what its shards need.

Orbax 0.12 reads no store but gs://. fsspec reads every store, with the same credentials and errors as all other files.
Chunks are uncompressed and in C order, so a part of a chunk is a range of its bytes.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401  (registers "bfloat16" with numpy)
import numpy as np
import xxhash

from vllama_jax.checkpoints.arrays import chunk_name, orbax_metadata, zarr_metadata
from vllama_jax.checkpoints.digests import FileDigest
from vllama_jax.errors import CheckpointError, format_error
from vllama_jax.io.json_files import parse_object
from vllama_jax.io.store_path import StorePath, read_files, read_ranges

if TYPE_CHECKING:
    import jax

BATCH_BYTES = 2 * 2**30  # read at once, at least one array
UPLOADS = 8  # objects written at once
Region = tuple[tuple[int, int], ...]  # start and stop along each axis
ByteRange = tuple[StorePath, int, int]  # of an object, start and stop


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array on an object store.

    Attributes:
        folder: The directory of its chunks.
        shape: Its shape.
        chunk: The shape of a chunk.
        dtype: Its dtype.
    """

    folder: StorePath
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _ChunkSlice:
    """The slice of a chunk that a region needs.

    Attributes:
        bytes: The bytes of the chunk from the first element of the slice to its last.
        shape: The shape of the slice.
        strides: Bytes from one element to the next along each axis of the chunk.
        target: Where the slice is in the region.
    """

    bytes: ByteRange
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    target: tuple[slice, ...]

    def values(self, content: memoryview, dtype: np.dtype) -> np.ndarray:
        file, start, stop = self.bytes
        if len(content) != stop - start:
            raise CheckpointError(f"{file}: truncated; copy it or convert the model again")
        return np.lib.stride_tricks.as_strided(np.frombuffer(content, dtype), self.shape, self.strides, writeable=False)


def open_arrays(directory: StorePath, paths: Iterable[str] | None = None) -> dict[str, StoredArray]:
    """Open arrays of a directory.

    Args:
        directory: The directory of arrays.
        paths: Their paths, such as "video_qformer/queries"; by default all arrays are listed and opened.

    Returns:
        The arrays by path.

    Raises:
        CheckpointError: An array is missing, the store cannot be read, or a .zarray is not of the layout that this
            package writes.
    """
    try:
        if paths is None:
            names = [name.removesuffix("/.zarray") for name in directory.file_sizes() if name.endswith("/.zarray")]
        else:
            names = [path.replace("/", ".") for path in paths]
        texts = read_files(directory / name / ".zarray" for name in names)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return {name.replace(".", "/"): _parse(directory / name, text) for name, text in zip(names, texts, strict=True)}


def _parse(folder: StorePath, text: bytes) -> StoredArray:
    where = str(folder / ".zarray")
    fields = parse_object(text, where, CheckpointError)
    try:
        shape, chunk, dtype = tuple(fields["shape"]), tuple(fields["chunks"]), np.dtype(fields["dtype"])
        valid = len(shape) == len(chunk) and all(type(size) is int and size > 0 for size in (*shape, *chunk))
        if not valid or fields["compressor"] is not None or fields["order"] != "C":
            raise ValueError("not an uncompressed array in C order")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: cannot be used ({format_error(error)})") from error
    return StoredArray(folder, shape, chunk, dtype)


def read_arrays(directory: StorePath, wanted: "Mapping[str, jax.ShapeDtypeStruct]") -> "dict[str, jax.Array]":
    """Read arrays into their shards. A host reads the bytes that its devices need, each once.

    Args:
        directory: The directory of arrays.
        wanted: Shape, dtype and sharding of each array, by path.

    Returns:
        The arrays by path.

    Raises:
        CheckpointError: An array is missing or has another shape, or the store cannot be read.
    """
    stored = open_arrays(directory, wanted)
    for path, leaf in wanted.items():
        if stored[path].shape != tuple(leaf.shape):
            raise CheckpointError(
                f"{directory}: {path} has shape {list(stored[path].shape)}; {list(leaf.shape)} is expected"
            )
    read: dict[str, jax.Array] = {}
    for batch in _batches(wanted, stored):
        try:
            read |= _read_batch(batch, wanted, stored)
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return read


def _batches(wanted: "Mapping[str, jax.ShapeDtypeStruct]", stored: Mapping[str, StoredArray]) -> Iterator[list[str]]:
    """Divide paths into batches of at most BATCH_BYTES on this host, so that small arrays share requests."""
    batch: list[str] = []
    total = 0
    for path, leaf in wanted.items():
        count = sum(math.prod(stop - start for start, stop in region) for region in _local_regions(leaf))
        size = count * stored[path].dtype.itemsize
        if batch and total + size > BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(path)
        total += size
    if batch:
        yield batch


def _read_batch(
    paths: Sequence[str], wanted: "Mapping[str, jax.ShapeDtypeStruct]", stored: Mapping[str, StoredArray]
) -> "dict[str, jax.Array]":
    import jax

    slices = {
        (path, region): list(_slice_chunks(stored[path], region))
        for path in paths
        for region in _local_regions(wanted[path])
    }
    contents = _read_merged(one.bytes for found in slices.values() for one in found)
    regions: dict[tuple[str, Region], np.ndarray] = {}
    for (path, region), found in slices.items():
        values = np.empty([stop - start for start, stop in region], stored[path].dtype)
        for one in found:
            values[one.target] = one.values(contents[one.bytes], stored[path].dtype)
        regions[path, region] = values.astype(wanted[path].dtype)

    def place(path: str) -> "jax.Array":
        leaf = wanted[path]
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: regions[path, _region(index, leaf.shape)]
        )

    return {path: place(path) for path in paths}


def _read_merged(wanted: Iterable[ByteRange]) -> dict[ByteRange, memoryview]:
    """Read ranges, and bytes that several of them have only once, as those of shards along the last axis do."""
    merged: list[tuple[ByteRange, list[ByteRange]]] = []  # a range that is read, and those that are in it
    for file, start, stop in sorted(set(wanted)):
        if merged and merged[-1][0][0] == file and start <= merged[-1][0][2]:
            (_, first, last), members = merged[-1]
            merged[-1] = ((file, first, max(last, stop)), [*members, (file, start, stop)])
        else:
            merged.append(((file, start, stop), [(file, start, stop)]))
    contents = read_ranges(found for found, _ in merged)
    return {
        (file, start, stop): memoryview(content)[start - first : stop - first]
        for ((_, first, _), members), content in zip(merged, contents, strict=True)
        for file, start, stop in members
    }


def _local_regions(leaf: "jax.ShapeDtypeStruct") -> list[Region]:
    """Return the regions of an array that devices of this process need, each once."""
    indices = leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape)).values()
    return list(dict.fromkeys(_region(index, leaf.shape) for index in indices))


def _region(index: Sequence[slice] | None, shape: Sequence[int]) -> Region:
    assert index is not None  # only None for devices of other processes
    bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in bounds)


def _slice_chunks(array: StoredArray, region: Region) -> Iterator[_ChunkSlice]:
    """Yield the slices of chunks that a region consists of."""
    starts, stops = np.array(region, np.int64).reshape(-1, 2).T
    chunk = np.array(array.chunk, np.int64)
    strides = np.array([math.prod(array.chunk[axis + 1 :]) for axis in range(len(chunk))], np.int64)
    strides *= array.dtype.itemsize
    for index in itertools.product(*map(range, starts // chunk, (stops - 1) // chunk + 1)):
        corner = np.array(index, np.int64) * chunk
        low, high = np.maximum(starts, corner), np.minimum(stops, corner + chunk)
        yield _ChunkSlice(
            bytes=(
                array.folder / chunk_name(index),
                int((low - corner) @ strides),
                int((high - 1 - corner) @ strides) + array.dtype.itemsize,
            ),
            shape=tuple(high - low),
            strides=tuple(strides),
            target=tuple(map(slice, low - starts, high - starts)),
        )


@dataclasses.dataclass(frozen=True)
class HostArray:
    """The shards of an array that this process writes, in host memory. A chunk is a shard.

    Attributes:
        shape: The shape of the array.
        chunk: The shape of a shard.
        dtype: Its dtype.
        shards: The shards, by their position along each axis.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype
    shards: dict[tuple[int, ...], np.ndarray]


def copy_shards(array: "jax.Array") -> HostArray:
    """Copy the shards of an array that this process writes to the host: of each shard, one process writes a replica."""
    chunk = array.sharding.shard_shape(array.shape)
    shards = {}
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            region = _region(shard.index, array.shape)
            index = tuple(start // size for (start, _), size in zip(region, chunk, strict=True))
            shards[index] = np.array(shard.data)  # a copy: the step donates its state
    return HostArray(array.shape, chunk, np.dtype(array.dtype), shards)


def write_arrays(directory: StorePath, arrays: Mapping[str, HostArray], with_metadata: bool) -> dict[str, FileDigest]:
    """Write this process's shards of arrays, UPLOADS at a time.

    Args:
        directory: The directory of arrays.
        arrays: The arrays by path.
        with_metadata: Also write the metadata of all arrays, which one process does.

    Returns:
        The size and digest of each object that was written, by its name below `directory`.

    Raises:
        OSError: The store cannot be written.
    """
    contents: dict[str, Any] = {}
    for path, array in arrays.items():
        folder = path.replace("/", ".")
        if with_metadata:
            contents[f"{folder}/.zarray"] = json.dumps(zarr_metadata(array.shape, array.chunk, array.dtype)).encode()
        for index, shard in array.shards.items():
            contents[f"{folder}/{chunk_name(index)}"] = np.ascontiguousarray(shard).reshape(-1).view(np.uint8)
    if with_metadata:
        leaves = {path: {"shape": list(array.shape)} for path, array in arrays.items()}
        contents["_METADATA"] = json.dumps(orbax_metadata(leaves)).encode()

    def write(name: str) -> FileDigest:
        (directory / name).write_bytes(contents[name])
        content = memoryview(contents[name])
        return FileDigest(size=content.nbytes, xxh3_128=xxhash.xxh3_128_hexdigest(content))

    with concurrent.futures.ThreadPoolExecutor(UPLOADS) as pool:
        return dict(zip(contents, pool.map(write, contents), strict=True))
