"""The files of the weights in a model directory: write them in chunks, check that they are complete, and read rows.

params/_METADATA   the tree of weights, in Orbax's format
params/a.b.c/      one weight: .zarray (its shape, dtype and chunks), and for each chunk a file of raw bytes in C order

Orbax writes this layout with use_ocdbt=False, and can read it anywhere. It is uncompressed, so that it can be written
directly, at the speed of the disk.
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

import ml_dtypes  # noqa: F401  (registers "bfloat16" with numpy)
import numpy as np

from vllama_jax.errors import CheckpointError
from vllama_jax.io.atomic import write_file, write_json
from vllama_jax.io.json_fields import LARGEST_INTEGER, format_value
from vllama_jax.io.json_files import parse_object, read_object
from vllama_jax.io.paths import is_store_path
from vllama_jax.io.store_path import StorePath, read_files

CHUNK_BYTES = 64 * 2**20  # maximum size of a file
SINGLE_FILE_BYTES = 2**20  # a weight of at most this size is one file, also if it has layers
CHUNKS_AHEAD = 2  # maximum number of submitted chunks that are not yet written
WRITERS = 2  # threads; one copies a chunk while the other waits for the disk: 1.2 GB/s, and 0.7 GB/s with one thread
STORED_DTYPES = ("float64", "float32", "bfloat16", "float16", "int8", "uint8")  # the last two are quantized values
ARRAY_HASHERS = 4  # number of weights that are read and hashed concurrently; each keeps a layer in memory


class ParamsWriter:
    """Writes weights one at a time in the layout that Orbax reads.

    It is a context manager. The directory is complete when the context ends without an error.

    Args:
        directory: The directory to create.

    Attributes:
        leaves: Entries of the manifest for the written weights, by path.
    """

    def __init__(self, directory: Path):
        self.leaves: dict[str, dict] = {}
        self._directory = directory
        self._disk = concurrent.futures.ThreadPoolExecutor(WRITERS)
        directory.mkdir()

    def write(self, path: str, shape: Sequence[int], dtype: np.dtype, blocks: Iterable[np.ndarray]) -> None:
        """Write a weight.

        One block and CHUNKS_AHEAD chunks are in memory at a time.

        Args:
            path: The path of the weight, such as "vit/blocks/mlp/up/kernel".
            shape: Its shape.
            dtype: Its dtype.
            blocks: Its rows in order, as C-contiguous arrays of any number of rows.

        Raises:
            OSError: A file cannot be written.
        """
        import xxhash

        directory = self._directory / path.replace("/", ".")
        directory.mkdir()
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
        """Copy the files of a weight from another directory of this layout.

        Args:
            path: The path of the weight.
            source: The other directory.
            leaf: The weight's entry in the manifest of the other model directory.

        Raises:
            OSError: A file cannot be read or written.
        """
        directory = self._directory / path.replace("/", ".")
        directory.mkdir()
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
    """Choose the shape of a weight's chunks: at most a layer and CHUNK_BYTES.

    Leading axes are divided first, and evenly, because chunks at the edge are padded to full size.

    Args:
        shape: The shape of the weight.
        itemsize: The size of its dtype in bytes.
    """
    chunk = list(shape)
    if math.prod(shape) * itemsize <= SINGLE_FILE_BYTES:
        return chunk
    if len(chunk) > 2:  # stacked layers
        chunk[0] = 1
    for axis, size in enumerate(chunk):
        count = min(size, math.ceil(math.prod(chunk) * itemsize / CHUNK_BYTES))
        chunk[axis] = math.ceil(size / count)
    return chunk


def _grid(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.ceil(size / step) for size, step in zip(shape, chunk, strict=True))


def _chunk_names(shape: Sequence[int], chunk: Sequence[int]) -> list[str]:
    return [chunk_name(index) for index in itertools.product(*map(range, _grid(shape, chunk)))]


def chunk_name(index: Iterable[int]) -> str:
    """Return the file name of a chunk, given its position along each axis; "0" of a scalar."""
    return ".".join(map(str, index)) or "0"


def _regroup_rows(blocks: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Regroup rows into blocks of `rows` rows; the last block may have fewer."""
    pending = None
    for block in blocks:
        pending = block if pending is None else np.concatenate([pending, block])
        while len(pending) > rows:
            yield pending[:rows]
            pending = pending[rows:]
        if len(pending) == rows:
            yield pending
            pending = None
    if pending is not None:
        yield pending


def _split_chunks(rows: np.ndarray, chunk: Sequence[int]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Split the rows of one chunk along the other axes, and return the chunks with their indices on those axes.

    Chunks at the edge are padded with zeros.
    """
    for index in itertools.product(*map(range, _grid(rows.shape, chunk)[1:])):
        slices = tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, chunk[1:], strict=True))
        values = rows[(slice(None), *slices)]
        if values.shape != tuple(chunk):
            values = np.pad(values, [(0, full - size) for full, size in zip(chunk, values.shape, strict=True)])
        yield index, np.ascontiguousarray(values)


def zarr_metadata(shape: Sequence[int], chunk: Sequence[int], dtype: np.dtype) -> dict[str, Any]:
    """Return the .zarray of an array, given its shape, the shape of a chunk, and its dtype."""
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
    """Return Orbax's metadata of the tree. It restores leaves of type np.ndarray without a device specification."""
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
    """Check that a manifest has a valid path, shape, dtype and hash for each weight.

    Args:
        leaves: The manifest's "leaves".
        where: The manifest's path, for the error message.

    Raises:
        CheckpointError: An entry is invalid.
    """
    advice = "copy or convert the model again"
    for path, entry in leaves.items():
        name = format_value(path).strip("'")
        if not isinstance(entry, dict) or not entry.keys() >= {"shape", "dtype", "xxh3_128"}:
            raise CheckpointError(f"{where}: {name}: shape, dtype or xxh3_128 is missing; {advice}")
        shape = entry["shape"]
        if not isinstance(shape, list) or not all(type(size) is int and 0 < size <= LARGEST_INTEGER for size in shape):
            raise CheckpointError(f"{where}: {name}: invalid shape {format_value(shape)}; {advice}")
        if entry["dtype"] not in STORED_DTYPES:
            raise CheckpointError(f"{where}: {name}: unsupported dtype {format_value(entry['dtype'])}; {advice}")
        if "" in path.split("/") or "." in path or "\0" in path:
            raise CheckpointError(f"{where}: {name} is not the path of a weight; {advice}")


def check_params(directory: Path, leaves: Mapping[str, Mapping[str, Any]], paths: Iterable[str]) -> None:
    """Check that the files of weights exist and have the shape, dtype and size in the manifest.

    Orbax reads a missing chunk as zeros.

    Args:
        directory: The directory params/.
        leaves: The manifest's "leaves".
        paths: The paths of the weights to check.

    Raises:
        CheckpointError: A file is missing, truncated, or does not match the manifest.
    """
    for path, sizes, metadata in _list_arrays(directory, paths):
        folder = directory / path.replace("/", ".")
        shape, dtype = leaves[path]["shape"], np.dtype(leaves[path]["dtype"])
        chunk: Any = metadata.get("chunks")
        if not _is_chunk(chunk, shape) or metadata != zarr_metadata(shape, chunk, dtype):
            raise CheckpointError(f"{folder}: does not match manifest.json; copy or convert the model again")
        expected = math.prod(chunk) * dtype.itemsize
        for name in _chunk_names(shape, chunk):
            if sizes.get(name) != expected:
                problem = f"has {sizes[name]} bytes instead of {expected}" if name in sizes else "missing"
                raise CheckpointError(f"{folder / name}: {problem}; copy or convert the model again")


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
            raise CheckpointError(
                f"{folder}: cannot be read ({error.strerror}); copy or convert the model again"
            ) from error
        yield path, sizes, read_object(folder / ".zarray")


def _list_store_arrays(
    directory: StorePath, paths: Sequence[str]
) -> Iterator[tuple[str, dict[str, int], dict[str, Any]]]:
    """Do as `_list_arrays` on an object store, with one listing, and all .zarray objects read at once."""
    folders = [directory / path.replace("/", ".") for path in paths]
    sizes: dict[str, dict[str, int]] = {}
    try:
        listed = folders[0] if len(folders) == 1 else directory
        for name, size in listed.file_sizes().items():
            array, _, file = name.rpartition("/")
            sizes.setdefault(array or listed.name, {})[file] = size
        texts = read_files([folder / ".zarray" for folder in folders])
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: cannot be read ({error.strerror}); copy or convert the model again"
        ) from error
    for path, folder, text in zip(paths, folders, texts, strict=True):
        yield path, sizes.get(folder.name, {}), parse_object(text, str(folder / ".zarray"), CheckpointError)


def read_rows(directory: Path, path: str, leaf: Mapping[str, Any], rows: range) -> np.ndarray:
    """Read rows of a weight from the files that contain them, after `check_params` has checked those.

    Args:
        directory: The directory params/.
        path: The path of the weight.
        leaf: The weight's entry in the manifest.
        rows: The rows on the first axis.

    Raises:
        CheckpointError: A file can no longer be read.
    """
    folder, shape, dtype = directory / path.replace("/", "."), leaf["shape"], np.dtype(leaf["dtype"])
    chunk = read_object(folder / ".zarray")["chunks"]
    out = np.empty((len(rows), *shape[1:]), dtype)
    row_size = math.prod(chunk[1:])
    for first in range(rows.start // chunk[0], (rows.stop - 1) // chunk[0] + 1):
        begin, end = max(rows.start, first * chunk[0]), min(rows.stop, (first + 1) * chunk[0])
        for index in itertools.product(*map(range, _grid(shape, chunk)[1:])):
            file = folder / chunk_name((first, *index))
            offset, count = (begin - first * chunk[0]) * row_size * dtype.itemsize, (end - begin) * row_size
            try:
                if is_store_path(file):
                    values = np.frombuffer(file.read_bytes(offset, offset + count * dtype.itemsize), dtype)
                else:
                    values = np.fromfile(file, dtype, count, offset=offset)
                values = values.reshape(end - begin, *chunk[1:])
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file}: changed while it was read ({error})") from error
            slices = [slice(i * size, (i + 1) * size) for i, size in zip(index, chunk[1:], strict=True)]
            target = out[(slice(begin - rows.start, end - rows.start), *slices)]
            target[...] = values[tuple(map(slice, target.shape))]
    return out


def iter_row_blocks(directory: Path, path: str, leaf: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Iterate over all rows of a weight in order, as many at a time as a chunk has.

    Args:
        directory: The directory params/.
        path: The path of the weight.
        leaf: The weight's entry in the manifest.

    Raises:
        CheckpointError: A file cannot be read.
    """
    height = read_object(directory / path.replace("/", ".") / ".zarray")["chunks"][0]
    for first in range(0, leaf["shape"][0], height):
        yield read_rows(directory, path, leaf, range(first, min(first + height, leaf["shape"][0])))


def _is_chunk(chunk: Any, shape: Sequence[int]) -> bool:
    return isinstance(chunk, list) and len(chunk) == len(shape) and all(type(n) is int and n > 0 for n in chunk)


def find_corrupt_params(
    directory: Path, leaves: Mapping[str, dict], progress: Callable[[int], None] = lambda done: None
) -> dict[str, str]:
    """Read all weights and compare their hashes with the manifest.

    Args:
        directory: The directory params/.
        leaves: The manifest's "leaves".
        progress: Called with the number of bytes read since its last call.

    Returns:
        For each weight whose files are missing, truncated or changed, a description of the problem, by path.
    """
    with concurrent.futures.ThreadPoolExecutor(ARRAY_HASHERS) as hashers:
        problems = hashers.map(lambda path: _check_array(directory, path, leaves[path], progress), leaves)
        return {path: problem for path, problem in zip(leaves, problems, strict=True) if problem}


def _check_array(directory: Path, path: str, leaf: Mapping[str, Any], progress: Callable[[int], None]) -> str:
    """Return a description of what is wrong with a weight's files; "" if they are intact."""
    import xxhash

    digest = xxhash.xxh3_128()
    try:
        check_params(directory, {path: leaf}, [path])
        for block in iter_row_blocks(directory, path, leaf):
            digest.update(block.view(np.uint8).data)
            progress(block.nbytes)
    except CheckpointError as error:
        return str(error)
    return "" if digest.hexdigest() == leaf["xxh3_128"] else "its content has changed since it was written"
