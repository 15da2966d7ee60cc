"""Files of torch.save, read with nothing of their pickle executed but what puts tensors together.

A zip (torch ≥ 1.6) is memory-mapped, so that what it declares of itself is checked first: torch maps a compressed entry
as if its bytes were numbers, and calls what a pickle names with whatever sizes it gives.
"""

import pickle
import pickletools
import re
import textwrap
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vllama_jax.errors import CheckpointError
from vllama_jax.runtime.extras import import_extra

REMAP_BYTES = 128 * 2**20  # read from a torch file before it is mapped anew; that takes about 10 ms
WRAPPERS = ("model", "state_dict", "module")  # as training scripts, Lightning and DeepSpeed wrap the tensors
LEGACY_PICKLES = 5  # at the start of a file of torch < 1.6: magic number, version, system, tensors, storage keys

# What a file of weights names in its pickle. torch allows more: bytearray(n) and torch.Tensor(n) allocate n bytes
# whatever the file's size, sparse and quantized tensors are none that we read.
ALLOWED_GLOBALS = re.compile(
    r"collections (OrderedDict|Counter)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch(\.storage)? \w+Storage"
    r"|torch (Size|device|(bfloat|float|int|uint|complex|bool)\w*)"  # the last are dtypes
    r"|(__builtin__|builtins) (set|complex)"
    r"|_codecs encode"
)


class TorchFile:
    """The tensors of a file; memory-mapped where it is a zip."""

    def __init__(self, path: Path, mappable: bool):
        self._path = path
        self._mappable = mappable
        self._lock = threading.Lock()
        self._loaded: Mapping[str, Any] | None = self._load()
        self._read_bytes = 0
        self.tensors = {name: (tuple(value.shape), _dtype_name(value)) for name, value in self._loaded.items()}

    def read(self, name: str) -> np.ndarray:
        with self._lock:
            if self._loaded is None:
                self._loaded, self._read_bytes = self._load(), 0
            tensor = self._loaded[name].detach()
            self._read_bytes += tensor.nbytes
            if self._mappable and self._read_bytes > REMAP_BYTES:
                self._loaded = None  # the map goes when the last array on it does
        return _to_numpy(tensor)

    def _load(self) -> Mapping[str, Any]:
        """The tensors, out of what training scripts wrap them in. No more of them than bytes."""
        held = _torch_load(self._path, self._mappable)
        for key in WRAPPERS:
            if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
                held = held[key]
        if not isinstance(held, Mapping):
            raise CheckpointError(f"{self._path}: not a file of weights (one {type(held).__name__}, no named tensors)")
        size = self._path.stat().st_size
        for name, value in held.items():
            if not isinstance(name, str) or not hasattr(value, "untyped_storage"):
                raise CheckpointError(f"{self._path}: not a file of weights ({name!r} in it is not a tensor)")
            if value.nbytes > size:  # one number, repeated by strides of zero
                raise CheckpointError(
                    f"{self._path}: {name} claims {list(value.shape)}, and the file has {size} bytes; get another one"
                )
        return held


def _torch_load(path: Path, mappable: bool) -> Any:
    torch = import_extra("torch", "convert", f"{path}: reading torch files", CheckpointError, "give safetensors")
    try:
        with path.open("rb") as file:
            for data in _zip_pickles(path, file) if mappable else [file] * LEGACY_PICKLES:
                _check_pickle(path, data)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, mmap=mappable, weights_only=True, map_location="cpu")
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r"unsupported global:? (?:GLOBAL )?(\S+)", str(error), re.IGNORECASE)
        raise _refusal(path, f"asks to run {code[1]}" if code else "holds more than tensors") from error
    except Exception as error:  # a damaged file can fail in any way
        why = textwrap.shorten((str(error) or type(error).__name__).splitlines()[0], 90, placeholder=" …")
        raise CheckpointError(f"{path}: not a file of weights, or a damaged one ({why}); download it again") from error


def _zip_pickles(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The pickle in a zip. Raises CheckpointError unless every entry is stored as it is, once, and inside the file."""
    size = path.stat().st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise CheckpointError(f"{path}: has several zip entries of one name; download it again")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise CheckpointError(
                    f"{path}: its zip entries are compressed or encrypted, which torch.save never does; load it with "
                    "torch and save it again"
                )
            if entry.file_size != entry.compress_size or entry.header_offset + entry.file_size > size:
                raise CheckpointError(
                    f"{path}: {entry.filename} claims {entry.file_size} bytes, which the file does not have; "
                    "download it again"
                )
        yield from (archive.read(entry) for entry in entries if entry.filename.endswith("/data.pkl"))


def _check_pickle(path: Path, data: bytes | BinaryIO) -> None:
    """Raise CheckpointError where a pickle names what weights have no need of. Only up to its end is read."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STACK_GLOBAL":  # of newer pickles than torch writes
            raise _refusal(path, "holds more than tensors")
        if opcode.name in ("GLOBAL", "INST") and not ALLOWED_GLOBALS.fullmatch(named := str(argument)):
            raise _refusal(path, f"asks to run {named.replace(' ', '.')}")


def _refusal(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: refused: its pickle {why}, and weights never need that; nothing of it was run. Get the file from a "
        "source you trust, as safetensors if there is one"
    )


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor's memory as numpy; numpy gets bfloat16 by its bits."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view("bfloat16")
    return tensor.numpy()
