"""Write files of tensors one tensor at a time: safetensors, and the zip files of torch.save.

Memory is that of the tensor being written and of those that are read ahead.
"""

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

from vllama_jax.io.prefetch import map_in_order

TENSOR_READERS = 2  # threads: tensors are read and transformed while another is written
ALIGNMENT = 64  # bytes; torch aligns the data of tensors in a zip file to this, so that it can be memory-mapped
ZIP_HEADER = 30  # bytes of an entry's header before its name
PICKLE_PROTOCOL = 2  # of torch.save
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
        _write_archive(file, _pickle_tensors(tensors, wrapped), tensors, progress)
        _sync(file)


def dump_tensor(values: np.ndarray) -> bytes:
    """Return the file that torch.save writes of one tensor.

    Args:
        values: Its values, C-contiguous, in a dtype of TORCH_STORAGES.
    """
    tensor = Tensor("", values.shape, values.dtype, lambda: values)
    file = io.BytesIO()
    _write_archive(file, _finish_pickle(_pickle_tensor(tensor, 0)), [tensor], lambda done: None)
    return file.getvalue()


def _write_archive(file: BinaryIO, pickled: bytes, tensors: Sequence[Tensor], progress: BytesProgress) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for number, data in enumerate(_read_ahead(tensors)):
            entry = _aligned_entry(f"archive/data/{number}", len(data), file.tell())
            with archive.open(entry, "w") as opened:
                opened.write(data)
            progress(len(data))
        archive.writestr("archive/version", "3\n")


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


def _pickle_tensors(tensors: Sequence[Tensor], wrapped: bool) -> bytes:
    """Pickle a state dict. The values of its tensors are the entries of the zip file, by their numbers."""
    items = (_pickle_value(tensor.name) + _pickle_tensor(tensor, number) for number, tensor in enumerate(tensors))
    state = pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS
    return _finish_pickle(
        pickle.EMPTY_DICT + _pickle_value("model") + state + pickle.SETITEM if wrapped else state  # {"model": state}
    )


def _pickle_tensor(tensor: Tensor, number: int) -> bytes:
    """Return the opcodes of a tensor: a call of torch's function that rebuilds it from its storage.

    The opcodes are written here, because Python's pickle imports the functions that it refers to.
    """
    shape = tensor.shape
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage_type = _pickle_global("torch", TORCH_STORAGES[tensor.dtype.name])
    key, location, size = map(_pickle_value, (str(number), "cpu", math.prod(shape)))
    storage = pickle.MARK + _pickle_value("storage") + storage_type + key + location + size + pickle.TUPLE
    values = b"".join(map(_pickle_value, (0, shape, strides, False)))  # the offset; whether it has a gradient
    hooks = _pickle_global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = pickle.MARK + storage + pickle.BINPERSID + values + hooks + pickle.TUPLE
    return _pickle_global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _pickle_global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _pickle_value(value: object) -> bytes:
    """Return the opcodes of a value, without those that begin and end a pickle."""
    return pickle.dumps(value, PICKLE_PROTOCOL)[2:-1]


def _finish_pickle(opcodes: bytes) -> bytes:
    return pickle.PROTO + bytes([PICKLE_PROTOCOL]) + opcodes + pickle.STOP
