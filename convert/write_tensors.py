"""Files of tensors, written one tensor after another: safetensors, and the zip files that torch.save makes.

Nothing but the tensor at hand is in memory, and those that are read ahead meanwhile.
"""

import collections
import dataclasses
import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vllama_jax.errors import CheckpointError
from vllama_jax.io.prefetch import map_in_order
from vllama_jax.runtime.extras import import_extra

TENSOR_READERS = 2  # one tensor is read and turned while another is written
ALIGNMENT = 64  # bytes; where torch puts a tensor's first one, so that mapped files serve as they are
ZIP_HEADER = 30  # bytes before an entry's name
PADDING_FIELD = 0x4246  # "FB": torch's own name for the field of a zip entry that holds the padding
SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
}
TORCH_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}
BytesProgress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to write. read: its values, in C order, when they are needed."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def require_torch() -> None:
    """Raises CheckpointError where torch is not installed."""
    import_extra("torch", "convert", "writing .pth files", CheckpointError, "use --format safetensors")


def write_safetensors(path: Path, tensors: Sequence[Tensor], progress: BytesProgress) -> None:
    """The format is a header in JSON and the tensors' bytes; the library that reads it writes whole files only."""
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # each at a multiple of its dtype's size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        name = SAFETENSORS_NAMES[tensor.dtype.name]
        header[tensor.name] = {"dtype": name, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in _read_ahead(tensors):
            file.write(data)
            progress(len(data))
        _sync(file)


def write_torch(path: Path, tensors: Sequence[Tensor], wrapped: bool, progress: BytesProgress) -> None:
    """What torch.save writes of the tensors by name, or, wrapped, of {"model": them}.

    That is a zip file of stored entries: a pickle that says what is where, and one entry for each tensor's bytes.
    """
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", _pickle_tensors(tensors, wrapped))
            archive.writestr("archive/byteorder", "little")
            for number, data in enumerate(_read_ahead(tensors)):
                entry = _aligned_entry(f"archive/data/{number}", len(data), file.tell())
                with archive.open(entry, "w") as opened:
                    opened.write(data)
                progress(len(data))
            archive.writestr("archive/version", "3\n")
        _sync(file)


def _read_ahead(tensors: Sequence[Tensor]) -> Iterator[memoryview]:
    for values in map_in_order(lambda tensor: tensor.read(), tensors, TENSOR_READERS):
        yield values.reshape(-1).view(np.uint8).data


def _sync(file: BinaryIO) -> None:
    """Waits for the disk: what is renamed into place later must be there after a power cut."""
    file.flush()
    os.fsync(file.fileno())


def _aligned_entry(name: str, size: int, offset: int) -> zipfile.ZipInfo:
    """A zip entry written at `offset`, whose data begin at a multiple of ALIGNMENT (below 2 GB)."""
    entry = zipfile.ZipInfo(name)
    entry.file_size = size
    padding = -(offset + ZIP_HEADER + len(name) + 4) % ALIGNMENT
    entry.extra = PADDING_FIELD.to_bytes(2, "little") + padding.to_bytes(2, "little") + bytes(padding)
    return entry


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The memory of a tensor. key: the name of its entry in the zip file."""

    key: str
    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class _PickledTensor:
    """Pickled as torch pickles a tensor: a call that makes it of its storage."""

    storage: _Storage

    def __reduce__(self) -> tuple:
        import torch

        shape = self.storage.tensor.shape
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        hooks: collections.OrderedDict = collections.OrderedDict()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, strides, False, hooks)


class _Pickler(pickle.Pickler):
    """Names a storage by its entry, as torch does."""

    def persistent_id(self, held: object) -> tuple | None:
        import torch

        if not isinstance(held, _Storage):
            return None
        kind = getattr(torch, TORCH_STORAGES[held.tensor.dtype.name])
        return ("storage", kind, held.key, "cpu", math.prod(held.tensor.shape))


def _pickle_tensors(tensors: Sequence[Tensor], wrapped: bool) -> bytes:
    state = {tensor.name: _PickledTensor(_Storage(str(number), tensor)) for number, tensor in enumerate(tensors)}
    data = io.BytesIO()
    _Pickler(data, protocol=2).dump({"model": state} if wrapped else state)
    return data.getvalue()
