"""Read PyTorch weight files lazily: opening a file reads names, shapes and dtypes, and `read` the data of one tensor.

Memory does not grow with the size of a file. Pages of a memory map count as resident memory from the first access until
they are unmapped. Safetensors are therefore read without mapping, and torch files (torch_files.py) are mapped again
after a number of bytes.
"""

import collections
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (registers "bfloat16" with numpy)
import numpy as np

from vllama_jax.convert.torch_files import TorchFile
from vllama_jax.errors import CheckpointError
from vllama_jax.io.json_files import parse_object, read_object
from vllama_jax.io.paths import read_first_bytes

ZIP, PICKLE = b"PK\x03\x04", b"\x80"


class WeightFile(Protocol):
    """An opened weight file.

    Attributes:
        tensors: Shape and name of the dtype of each tensor, by name.
    """

    tensors: dict[str, tuple[tuple[int, ...], str]]

    def read(self, name: str) -> np.ndarray:
        """Read a tensor. Raises CheckpointError if the file is corrupt or cannot be read."""
        ...


class Source:
    """The tensors of a file, or of the shards of a model.

    Attributes:
        label: The path, as messages name it.
        files: The files on disk.
        shapes: The shapes of the tensors by name.
        dtypes: The names of their dtypes.
        duplicates: Names that are in more than one of the files.
        notes: Lines for the user.
    """

    def __init__(self, label: str, files: Sequence[Path], weight_files: Iterable[WeightFile]):
        self.label = label
        self.files = list(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.duplicates: list[str] = []
        self.notes: list[str] = []
        self._homes: dict[str, WeightFile] = {}
        for weight_file in weight_files:
            self.duplicates += weight_file.tensors.keys() & self._homes.keys()
            for name, (shape, dtype) in weight_file.tensors.items():
                self.shapes[name], self.dtypes[name], self._homes[name] = shape, dtype, weight_file

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor, for the inference of config fields.

        Args:
            name: The name of the tensor.
            axes: The expected number of axes.

        Raises:
            CheckpointError: The tensor is missing, empty, or has another number of axes.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{self.label}: incomplete, {name} is missing")
        if len(self.shapes[name]) != axes or 0 in self.shapes[name]:
            raise CheckpointError(f"{self.label}: {name} is {list(self.shapes[name])}, but {axes} axes are expected")
        return self.shapes[name]

    def read(self, name: str) -> np.ndarray:
        """Read a tensor. Raises CheckpointError if its file is corrupt or cannot be read."""
        return self._homes[name].read(name)


class _RenamedFile:
    """A WeightFile with the tensors of a source under other names."""

    def __init__(self, source: Source, names: Mapping[str, str]):
        self._source = source
        self._theirs = {ours: theirs for theirs, ours in names.items()}
        self.tensors = {names[name]: (shape, source.dtypes[name]) for name, shape in source.shapes.items()}

    def read(self, name: str) -> np.ndarray:
        return self._source.read(self._theirs[name])


def rename_tensors(source: Source, names: Mapping[str, str], note: str) -> Source:
    """Rename the tensors of a source.

    Args:
        source: The source, which is not changed.
        names: The new name of each tensor.
        note: A line for the user about it.
    """
    result = Source(source.label, source.files, [_RenamedFile(source, names)])
    counts = collections.Counter(names.values())
    result.duplicates = [name for name in counts if counts[name] > 1]
    result.duplicates += [names[name] for name in source.duplicates]
    result.notes = [*source.notes, note]
    return result


def open_file(path: str | Path) -> Source:
    """Open a weight file, safetensors or written by torch.save. The format is detected from the content.

    Raises:
        CheckpointError: The file is missing, empty, a git-lfs pointer, corrupt or not a weight file, its pickle refers
            to anything but tensors, or torch is needed and not installed.
    """
    return open_files(str(path), [Path(path)])


def open_files(label: str, paths: Sequence[Path]) -> Source:
    """Open the shards of a model as one source. Raises CheckpointError as `open_file`."""
    return Source(label, paths, map(open_weight_file, paths))


def open_llama(directory: str | Path) -> Source:
    """Open the weights of a language model in Hugging Face's layout: one file or shards, safetensors or `.bin`.

    Safetensors are preferred. Other weights in the directory are ignored, with a note.

    Raises:
        CheckpointError: As `open_file`, or the directory has no weights, or a shard is missing.
    """
    directory = Path(directory)
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    found = [directory / name for name in names if (directory / name).exists()]
    if not found:
        raise CheckpointError(
            f"{directory}: no model.safetensors, pytorch_model.bin or index of their shards; download the weights"
        )
    first, *others = found
    shards = [directory / shard for shard in _shards(first)] if first.suffix == ".json" else [first]
    source = open_files(str(directory), shards)
    source.notes = [f"{other}: ignored, the weights are read from {first.name}" for other in others]
    return source


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a JSON object from a downloaded file. Raises CheckpointError if it is missing or not JSON."""
    check_weight_file(path)
    return read_object(path)


def _shards(index: Path) -> list[str]:
    """Return the file names of the shards in an index."""
    shards = read_config_file(index).get("weight_map")
    if not isinstance(shards, Mapping) or not shards or not all(_is_file_name(name) for name in shards.values()):
        raise CheckpointError(f"{index}: not an index of shards (no weight_map of file names); download it again")
    return sorted(set(shards.values()))


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def check_weight_file(path: Path) -> bytes:
    """Return the first bytes of a file. Raises CheckpointError for a missing or empty file, or a web page."""
    head = read_first_bytes(path, CheckpointError)
    if head.startswith(b"<"):
        raise CheckpointError(f"{path}: an HTML page, not the file itself; the download may require a login")
    return head


def looks_like_weights(head: bytes) -> bool:
    """Whether the first bytes may be those of a file of torch.save or of safetensors."""
    return head.startswith((ZIP, PICKLE)) or _looks_like_safetensors(head)


def _looks_like_safetensors(head: bytes) -> bool:
    """Whether JSON follows a length of eight bytes. The first byte of the length may equal PICKLE."""
    return head[8:9] == b"{"


def open_weight_file(path: Path) -> WeightFile:
    """Open a file. Its format is detected from the content, not from the name."""
    head = check_weight_file(path)
    if head.startswith((ZIP, PICKLE)) and not _looks_like_safetensors(head):
        return TorchFile(path, mappable=head.startswith(ZIP))
    if looks_like_weights(head) or path.suffix == ".safetensors":
        return SafetensorsFile(path)
    raise CheckpointError(f"{path}: not a weight file (neither safetensors nor written by torch.save)")


class SafetensorsFile:
    """A WeightFile in the safetensors format: a JSON header, then the data."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self._path = path
        try:
            with safe_open(path, framework="numpy"):
                pass  # the library checks the header: its length, sizes and overlaps
        except SafetensorError as error:
            raise CheckpointError(f"{path}: corrupt safetensors file ({error}); download it again") from error
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = parse_object(file.read(header_bytes), str(path), CheckpointError)
        header.pop("__metadata__", None)
        self.tensors = {
            name: (tuple(entry["shape"]), _SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"]))
            for name, entry in header.items()
        }
        self._starts = {name: 8 + header_bytes + entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, name: str) -> np.ndarray:
        """Read a tensor. Raises CheckpointError if the file cannot be read any more."""
        shape, dtype = self.tensors[name]
        try:
            with self._path.open("rb") as file:
                values = np.fromfile(file, np.dtype(dtype), math.prod(shape), offset=self._starts[name])
                if hasattr(os, "posix_fadvise"):  # not on macOS
                    # Release the pages of the system's cache for the next tensor (docs/decisions.md, D-043).
                    os.posix_fadvise(file.fileno(), self._starts[name], values.nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be read ({error.strerror or error})") from error
        if len(values) < math.prod(shape):
            raise CheckpointError(f"{self._path}: was truncated while it was read")
        return values.reshape(shape)


_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
}


def count_layers(source: Source, pattern: str) -> int:
    """Return the number of layers in a file: 1 + the largest number in the first group of `pattern`."""
    found = [int(match[1]) for name in source.shapes if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1
