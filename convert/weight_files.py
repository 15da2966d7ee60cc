"""Weight files, read lazily: which tensors a file holds is known at once, a tensor's data when it is asked for.

Little of a file is ever in memory: safetensors are read, not mapped, and torch files (torch_files.py) are mapped anew
now and then, because every page of a memory map that was touched counts as memory until it is unmapped.
"""

import collections
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (numpy learns "bfloat16")
import numpy as np

from vllama_jax.convert.torch_files import TorchFile
from vllama_jax.errors import CheckpointError
from vllama_jax.io.json_files import parse_object, read_object
from vllama_jax.io.paths import read_first_bytes

ZIP, PICKLE = b"PK\x03\x04", b"\x80"


class WeightFile(Protocol):
    """What holds tensors. tensors: the shape and the dtype's name of each; nothing of their data is read yet."""

    tensors: dict[str, tuple[tuple[int, ...], str]]

    def read(self, name: str) -> np.ndarray: ...


class Source:
    """The tensors of one file, or of several files that hold one set: names, shapes, dtypes' names, data on demand.

    label: what errors call it. files: on disk. duplicates: names that more than one of `parts` has. notes: what the
    user should know of how it was read.
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
        """The shape of a tensor that dimensions are read off.

        Raises CheckpointError when it is missing or has not that many axes.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{self.label}: incomplete, {name} is missing")
        if len(self.shapes[name]) != axes or 0 in self.shapes[name]:
            raise CheckpointError(f"{self.label}: {name} is {list(self.shapes[name])}, where {axes} axes are expected")
        return self.shapes[name]

    def read(self, name: str) -> np.ndarray:
        return self._homes[name].read(name)


class _RenamedFile:
    """A WeightFile of another source's tensors under other names."""

    def __init__(self, source: Source, names: Mapping[str, str]):
        self._source = source
        self._theirs = {ours: theirs for theirs, ours in names.items()}
        self.tensors = {names[name]: (shape, source.dtypes[name]) for name, shape in source.shapes.items()}

    def read(self, name: str) -> np.ndarray:
        return self._source.read(self._theirs[name])


def rename_tensors(source: Source, names: Mapping[str, str], note: str) -> Source:
    """The same tensors under other names. note: what the user should know of it."""
    made = Source(source.label, source.files, [_RenamedFile(source, names)])
    counts = collections.Counter(names.values())
    made.duplicates = [name for name in counts if counts[name] > 1]
    made.duplicates += [names[name] for name in source.duplicates]
    made.notes = [*source.notes, note]
    return made


def open_file(path: str | Path) -> Source:
    """A `.pth`, `.bin` or `.safetensors` file.

    Raises CheckpointError for a file that is missing, empty, a git-lfs pointer or no weights, for one whose pickle asks
    for code, and for a torch file when torch is not installed.
    """
    return open_files(str(path), [Path(path)])


def open_files(label: str, paths: Sequence[Path]) -> Source:
    """Several files that hold one set of tensors. Raises CheckpointError as `open_file` does."""
    return Source(label, paths, map(open_weight_file, paths))


def open_llama(directory: str | Path) -> Source:
    """The weights of a Hugging Face LLaMA directory: one file or shards, safetensors or `.bin`.

    Raises CheckpointError as `open_file` does, and where no weights are there or a shard is missing.
    """
    directory = Path(directory)
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    there = [directory / name for name in names if (directory / name).exists()]
    if not there:
        raise CheckpointError(
            f"{directory}: no model.safetensors, pytorch_model.bin or index of their shards; download the weights there"
        )
    first, *others = there
    shards = [directory / shard for shard in _shards(first)] if first.suffix == ".json" else [first]
    source = open_files(str(directory), shards)
    source.notes = [f"{other}: ignored, the weights are read from {first.name}" for other in others]
    return source


def read_config_file(path: Path) -> dict[str, Any]:
    """A JSON object in a downloaded file. Raises CheckpointError where there is none to read, or another file."""
    check_weight_file(path)
    return read_object(path)


def _shards(index: Path) -> list[str]:
    """The names of the files beside an index that hold the weights."""
    shards = read_config_file(index).get("weight_map")
    if not isinstance(shards, Mapping) or not shards or not all(_is_file_name(name) for name in shards.values()):
        raise CheckpointError(f"{index}: not an index of shards (no weight_map of file names); download it again")
    return sorted(set(shards.values()))


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def check_weight_file(path: Path) -> bytes:
    """A file's first bytes. Raises CheckpointError for a path that cannot be a weight file."""
    head = read_first_bytes(path, CheckpointError)
    if head.startswith(b"<"):
        raise CheckpointError(f"{path}: a web page, not the file itself; downloading it may need a login")
    return head


def looks_like_weights(head: bytes) -> bool:
    """Whether a file's first bytes are those of a file of torch's or safetensors; other files may have them too."""
    return head.startswith((ZIP, PICKLE)) or _looks_like_safetensors(head)


def _looks_like_safetensors(head: bytes) -> bool:
    """A length in eight bytes, then JSON. The length may begin with PICKLE: a header in 32 does."""
    return head[8:9] == b"{"


def open_weight_file(path: Path) -> WeightFile:
    """Tells the format by content, not by name."""
    head = check_weight_file(path)
    if head.startswith((ZIP, PICKLE)) and not _looks_like_safetensors(head):
        return TorchFile(path, mappable=head.startswith(ZIP))
    if looks_like_weights(head) or path.suffix == ".safetensors":
        return SafetensorsFile(path)
    raise CheckpointError(f"{path}: not a file of weights (neither safetensors nor written by torch)")


class SafetensorsFile:
    """A header in JSON, then the tensors' bytes."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self._path = path
        try:
            with safe_open(path, framework="numpy"):
                pass  # the library has checked the header: its length, sizes, overlaps
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged safetensors file ({error}); download it again") from error
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
        shape, dtype = self.tensors[name]
        try:
            with self._path.open("rb") as file:
                values = np.fromfile(file, np.dtype(dtype), math.prod(shape), offset=self._starts[name])
                if hasattr(os, "posix_fadvise"):  # not on macOS
                    # Read once: the next tensor takes the same pages of the system's cache (docs/decisions.md, D-043).
                    os.posix_fadvise(file.fileno(), self._starts[name], values.nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be read any more ({error.strerror or error})") from error
        if len(values) < math.prod(shape):
            raise CheckpointError(f"{self._path}: became shorter while it was read")
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
    """How many layers a file holds: one more than the largest number that `pattern` catches in a name."""
    found = [int(match[1]) for name in source.shapes if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1
