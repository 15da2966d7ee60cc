"""The weights of a model directory as files: written chunk by chunk, found whole before they are read, read by rows.

params/_METADATA   the tree of weights, as Orbax has it
params/a.b.c/      one weight: .zarray (its shape, dtype and chunks) and a file of raw bytes in C order for each chunk

This is what Orbax writes with use_ocdbt=False and reads anywhere; without compression it is simple enough to be
written directly, at the speed of the disk.
"""

import collections
import concurrent.futures
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import ml_dtypes  # noqa: F401  (numpy learns "bfloat16")
import numpy as np

from vllama_jax.errors import CheckpointError
from vllama_jax.io.atomic import make_directory, write_file, write_json
from vllama_jax.io.json_fields import LARGEST_INTEGER, format_value
from vllama_jax.io.json_files import parse_object, read_object
from vllama_jax.io.paths import is_store_path
from vllama_jax.io.store_path import StorePath, read_files

CHUNK_BYTES = 64 * 2**20  # of a file at most
SINGLE_FILE_BYTES = 2**20  # a weight of at most this is one file, whatever its layers
CHUNKS_AHEAD = 2  # handed to the disk and not yet written
WRITERS = 2  # one copies a chunk while another waits for the disk: 1.2 GB/s where one reached 0.7
STORED_DTYPES = ("float64", "float32", "bfloat16", "float16", "int8", "uint8")  # the last two are quantized values
ARRAY_HASHERS = 4  # weights read and hashed at once; each holds a layer


class ParamsWriter:
    """Writes weights one after another in the layout that Orbax reads.

    leaves: what was written, as the manifest has it. A context manager: leaving it completes the directory.
    """

    def __init__(self, directory: Path):
        self.leaves: dict[str, dict] = {}
        self._directory = directory
        self._disk = concurrent.futures.ThreadPoolExecutor(WRITERS)
        make_directory(directory)

    def write(self, path: str, shape: Sequence[int], dtype: np.dtype, blocks: Iterable[np.ndarray]) -> None:
        """path: as "vit/blocks/mlp/up/kernel". blocks: the weight's rows in order, in its dtype, C-contiguous.

        In memory are one block and CHUNKS_AHEAD chunks, which the disk writes meanwhile.
        """
        import xxhash

        directory = self._directory / path.replace("/", ".")
        make_directory(directory)
        chunk = chunk_shape(shape, dtype.itemsize)
        write_json(directory / ".zarray", zarr_metadata(shape, chunk, dtype))
        digest = xxhash.xxh3_128()
        writes: collections.deque[concurrent.futures.Future[None]] = collections.deque()
        for first, rows in enumerate(_regroup_rows(blocks, chunk[0])):
            digest.update(rows.view(np.uint8).data)
            for index, values in _split_chunks(rows, chunk):
                file = directory / ".".join(map(str, (first, *index)))
                writes.append(self._disk.submit(write_file, file, values.view(np.uint8)))
            while len(writes) > CHUNKS_AHEAD:
                writes.popleft().result()
        for write in writes:
            write.result()
        self.leaves[path] = {"shape": list(shape), "dtype": dtype.name, "xxh3_128": digest.hexdigest()}

    def copy(self, path: str, source: Path, leaf: Mapping[str, Any]) -> None:
        """A weight of another directory of this layout, file by file. leaf: what its manifest says."""
        directory = self._directory / path.replace("/", ".")
        make_directory(directory)
        folder = source / directory.name
        chunk = read_object(folder / ".zarray")["chunks"]
        for name in [".zarray", *_chunk_names(leaf["shape"], chunk)]:
            if is_store_path(folder) or is_store_path(directory):
                write_file(directory / name, (folder / name).read_bytes())
                continue
            shutil.copyfile(folder / name, directory / name)
            with (directory / name).open("rb+") as file:
                os.fsync(file.fileno())
        self.leaves[path] = dict(leaf)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type | None, *_: object) -> None:
        self._disk.shutdown(cancel_futures=True)
        if failed is None:
            write_json(self._directory / "_METADATA", orbax_metadata(self.leaves))


def chunk_shape(shape: Sequence[int], itemsize: int) -> list[int]:
    """At most a layer and at most CHUNK_BYTES; leading axes are cut first, and evenly, as edges are stored whole."""
    chunk = list(shape)
    if math.prod(shape) * itemsize <= SINGLE_FILE_BYTES:
        return chunk
    if len(chunk) > 2:  # stacked layers; in a plain matrix the first axis is cut only as far as the size asks
        chunk[0] = 1
    for axis, size in enumerate(chunk):
        pieces = min(size, math.ceil(math.prod(chunk) * itemsize / CHUNK_BYTES))
        chunk[axis] = math.ceil(size / pieces)
    return chunk


def _grid(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.ceil(size / part) for size, part in zip(shape, chunk, strict=True))


def _chunk_names(shape: Sequence[int], chunk: Sequence[int]) -> list[str]:
    return [chunk_name(index) for index in itertools.product(*map(range, _grid(shape, chunk)))]


def chunk_name(index: Iterable[int]) -> str:
    """Return the file name of a chunk, given its position along each axis; "0" of a scalar."""
    return ".".join(map(str, index)) or "0"


def _regroup_rows(blocks: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same rows, so many at a time."""
    held = None
    for block in blocks:
        held = block if held is None else np.concatenate([held, block])
        while len(held) > rows:
            yield held[:rows]
            held = held[rows:]
        if len(held) == rows:
            yield held
            held = None
    if held is not None:
        yield held


def _split_chunks(rows: np.ndarray, chunk: Sequence[int]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The chunks that rows of a whole first axis fall into, with their places along the other axes.

    A chunk at the edge is stored whole, the rest of it zeros.
    """
    for index in itertools.product(*map(range, _grid(rows.shape, chunk)[1:])):
        here = tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, chunk[1:], strict=True))
        values = rows[(slice(None), *here)]
        if values.shape != tuple(chunk):
            values = np.pad(values, [(0, size - held) for size, held in zip(chunk, values.shape, strict=True)])
        yield index, np.ascontiguousarray(values)


def zarr_metadata(shape: Sequence[int], chunk: Sequence[int], dtype: np.dtype) -> dict[str, Any]:
    return {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(chunk),
        "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
        "order": "C",
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "dimension_separator": ".",
    }


def orbax_metadata(leaves: Mapping[str, dict]) -> dict[str, Any]:
    """The tree that the arrays make up. Value type np.ndarray: Orbax restores those without being told devices."""
    tree = {}
    for path, leaf in leaves.items():
        keys = tuple(path.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": leaf["shape"],
            },
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def check_manifest(leaves: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError unless a manifest says of each weight its shape, its dtype and its digest.

    Args:
        leaves: The manifest's "leaves".
        where: The manifest's path, for the message.
    """
    for path, entry in leaves.items():
        name = format_value(path).strip("'")
        advice = f"incomplete, of {name}; copy or convert the model again"
        if not isinstance(entry, dict) or not entry.keys() >= {"shape", "dtype", "xxh3_128"}:
            raise CheckpointError(f"{where}: {advice}")
        shape = entry["shape"]
        if not isinstance(shape, list) or not all(type(size) is int and 0 < size <= LARGEST_INTEGER for size in shape):
            raise CheckpointError(f"{where}: shape {format_value(shape)}: {advice}")
        if entry["dtype"] not in STORED_DTYPES:
            raise CheckpointError(f"{where}: dtype {format_value(entry['dtype'])}: {advice}")
        if "" in path.split("/") or "." in path or "\0" in path:
            raise CheckpointError(f"{where}: {name} is not the path of a weight; copy or convert the model again")


def check_params(directory: Path, leaves: Mapping[str, Mapping[str, Any]], paths: Iterable[str]) -> None:
    """Raises CheckpointError where files of these weights are missing, or are not what the manifest's leaves say.

    Orbax would take a missing chunk for zeros.
    """
    for path, sizes, metadata in _list_arrays(directory, paths):
        folder = directory / path.replace("/", ".")
        shape, dtype = leaves[path]["shape"], np.dtype(leaves[path]["dtype"])
        chunk: Any = metadata.get("chunks")
        if not _is_chunk(chunk, shape) or metadata != zarr_metadata(shape, chunk, dtype):
            raise CheckpointError(f"{folder}: not the array that manifest.json describes; copy or convert it again")
        whole = math.prod(chunk) * dtype.itemsize
        for name in _chunk_names(shape, chunk):
            if sizes.get(name) != whole:
                held = f"{sizes[name]} of its {whole} bytes are there" if name in sizes else "it is missing"
                raise CheckpointError(f"{folder / name}: {held}; copy or convert the model again")


def _list_arrays(directory: Path, paths: Iterable[str]) -> Iterator[tuple[str, dict[str, int], dict[str, Any]]]:
    """Yield of each weight its path, the sizes of its files, and its .zarray."""
    if is_store_path(directory):
        yield from _list_store_arrays(directory, list(paths))
        return
    for path in paths:
        folder = directory / path.replace("/", ".")
        try:
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read ({error.strerror}); copy or convert it again") from error
        yield path, sizes, read_object(folder / ".zarray")


def _list_store_arrays(
    directory: StorePath, paths: Sequence[str]
) -> Iterator[tuple[str, dict[str, int], dict[str, Any]]]:
    """The same on an object store, with one listing of the directory, and all .zarray objects read at once."""
    folders = [directory / path.replace("/", ".") for path in paths]
    sizes: dict[str, dict[str, int]] = {}
    try:
        for name, size in directory.file_sizes().items():
            folder, _, file = name.rpartition("/")
            sizes.setdefault(folder, {})[file] = size
        texts = read_files([folder / ".zarray" for folder in folders])
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: cannot be read ({error.strerror}); copy or convert it again"
        ) from error
    for path, folder, text in zip(paths, folders, texts, strict=True):
        yield path, sizes.get(folder.name, {}), parse_object(text, str(folder / ".zarray"), CheckpointError)


def read_rows(directory: Path, path: str, leaf: Mapping[str, Any], rows: range) -> np.ndarray:
    """Rows of a weight's first axis, from the files that hold them. leaf: what the manifest says of the weight.

    Its files are whole, as `check_params` found. Raises CheckpointError when they cannot be read any more.
    """
    folder, shape, dtype = directory / path.replace("/", "."), leaf["shape"], np.dtype(leaf["dtype"])
    chunk = read_object(folder / ".zarray")["chunks"]
    out = np.empty((len(rows), *shape[1:]), dtype)
    row_size = math.prod(chunk[1:])
    for first in range(rows.start // chunk[0], (rows.stop - 1) // chunk[0] + 1):
        begin, end = max(rows.start, first * chunk[0]), min(rows.stop, (first + 1) * chunk[0])
        for index in itertools.product(*map(range, _grid(shape, chunk)[1:])):
            file = folder / chunk_name((first, *index))
            skipped = (begin - first * chunk[0]) * row_size * dtype.itemsize
            count = (end - begin) * row_size
            try:
                if is_store_path(file):
                    values = np.frombuffer(file.read_bytes(skipped, skipped + count * dtype.itemsize), dtype)
                else:
                    values = np.fromfile(file, dtype, count, offset=skipped)
                values = values.reshape(end - begin, *chunk[1:])
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file}: changed while it was read ({error})") from error
            here = [slice(i * size, (i + 1) * size) for i, size in zip(index, chunk[1:], strict=True)]
            place = out[(slice(begin - rows.start, end - rows.start), *here)]
            place[...] = values[tuple(map(slice, place.shape))]
    return out


def iter_row_blocks(directory: Path, path: str, leaf: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """All of a weight's rows in order, a chunk's height at a time; see `read_rows`."""
    height = read_object(directory / path.replace("/", ".") / ".zarray")["chunks"][0]
    for first in range(0, leaf["shape"][0], height):
        yield read_rows(directory, path, leaf, range(first, min(first + height, leaf["shape"][0])))


def _is_chunk(chunk: Any, shape: Sequence[int]) -> bool:
    return isinstance(chunk, list) and len(chunk) == len(shape) and all(type(n) is int and n > 0 for n in chunk)


def find_corrupt_params(
    directory: Path, leaves: Mapping[str, dict], progress: Callable[[int], None] = lambda done: None
) -> dict[str, str]:
    """The weights whose files are not those that were written, by path, and what is wrong with each.

    All are read, and their xxh3_128 computed again. progress is called with the bytes read since.
    """
    with concurrent.futures.ThreadPoolExecutor(ARRAY_HASHERS) as hashers:
        found = hashers.map(lambda path: _check_array(directory, path, leaves[path], progress), leaves)
        return {path: damage for path, damage in zip(leaves, found, strict=True) if damage}


def _check_array(directory: Path, path: str, leaf: Mapping[str, Any], progress: Callable[[int], None]) -> str:
    """What is wrong with a weight's files; "" for nothing."""
    import xxhash

    digest = xxhash.xxh3_128()
    try:
        check_params(directory, {path: leaf}, [path])
        for block in iter_row_blocks(directory, path, leaf):
            digest.update(block.view(np.uint8).data)
            progress(block.nbytes)
    except CheckpointError as error:
        return str(error)
    return "" if digest.hexdigest() == leaf["xxh3_128"] else "its bytes are not those that were written"
