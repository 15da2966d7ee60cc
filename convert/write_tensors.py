"""Write files of tensors one tensor at a time: safetensors, and the zip files of torch.save.

Memory is that of the tensor being written and of those that are read ahead.
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

TENSOR_READERS = 2  # threads: tensors are read and transformed while another is written
ALIGNMENT = 64  # bytes; torch aligns the data of tensors in a zip file to this, so that it can be memory-mapped
ZIP_HEADER = 30  # bytes of an entry's header before its name
PADDING_FIELD = 0x4246  # "FB": torch's id of the extra field of a zip entry with padding
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
    """A tensor to write.

    Attributes:
        name: Its name in the file.
        shape: Its shape.
        dtype: Its dtype.
        read: Returns its values, C-contiguous.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """The size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def require_torch() -> None:
    """Raise CheckpointError if torch is not installed."""
    import_extra("torch", "convert", "writing .pth files", CheckpointError, "use --format safetensors")


def write_safetensors(path: Path, tensors: Sequence[Tensor], progress: BytesProgress) -> None:
    """Write a safetensors file. The safetensors library can only write tensors that are all in memory.

    Args:
        path: The file to create.
        tensors: The tensors to write.
        progress: Called with the number of bytes written since the last call.
    """
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # aligns all to the size of their dtype
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
    """Write a file as torch.save does: a zip file with a pickle of the state dict, and an entry for each tensor's data.

    Args:
        path: The file to create.
        tensors: The tensors to write.
        wrapped: Whether to write {"model": state dict} in place of the state dict.
        progress: Called with the number of bytes written since the last call.
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
    """Write a file to disk, so that it is complete after a power failure once it is renamed into place."""
    file.flush()
    os.fsync(file.fileno())


def _aligned_entry(name: str, size: int, offset: int) -> zipfile.ZipInfo:
    """Return a zip entry to be written at `offset`, padded so that its data is aligned (files below 2 GB)."""
    entry = zipfile.ZipInfo(name)
    entry.file_size = size
    padding = -(offset + ZIP_HEADER + len(name) + 4) % ALIGNMENT
    entry.extra = PADDING_FIELD.to_bytes(2, "little") + padding.to_bytes(2, "little") + bytes(padding)
    return entry


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The storage of a tensor. `key` is the name of its entry in the zip file."""

    key: str
    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class _PickledTensor:
    """Pickles like a torch tensor: as a call of the function that rebuilds it from its storage."""

    storage: _Storage

    def __reduce__(self) -> tuple:
        import torch

        shape = self.storage.tensor.shape
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        hooks: collections.OrderedDict = collections.OrderedDict()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, strides, False, hooks)


class _Pickler(pickle.Pickler):
    """Pickles a storage as a persistent id with the name of its entry, as torch does."""

    def persistent_id(self, obj: object) -> tuple | None:
        import torch

        if not isinstance(obj, _Storage):
            return None
        storage_type = getattr(torch, TORCH_STORAGES[obj.tensor.dtype.name])
        return ("storage", storage_type, obj.key, "cpu", math.prod(obj.tensor.shape))


def _pickle_tensors(tensors: Sequence[Tensor], wrapped: bool) -> bytes:
    state = {tensor.name: _PickledTensor(_Storage(str(number), tensor)) for number, tensor in enumerate(tensors)}
    data = io.BytesIO()
    _Pickler(data, protocol=2).dump({"model": state} if wrapped else state)
    return data.getvalue()
