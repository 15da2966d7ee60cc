"""Read files of torch.save safely: a pickle can only call the functions that rebuild tensors.

Zip files (torch ≥ 1.6) are memory-mapped. Their headers are checked first, because torch maps compressed entries as if
they were raw data, and passes any sizes in the pickle to the functions that it calls.
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

REMAP_BYTES = 128 * 2**20  # bytes read before a file is mapped again, which takes about 10 ms
WRAPPERS = ("model", "state_dict", "module")  # keys of the state dict in files of Lightning, DeepSpeed and others
LEGACY_PICKLES = 5  # at the start of a file of torch < 1.6: magic number, version, system, tensors, storage keys

# The globals that the pickle of a weight file needs. torch's weights_only allows more: bytearray(n) and
# torch.Tensor(n), which allocate n bytes whatever the file's size, and unsupported sparse and quantized tensors.
ALLOWED_GLOBALS = re.compile(
    r"collections (OrderedDict|Counter)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch(\.storage)? \w+Storage"
    r"|torch (Size|device|(bfloat|float|int|uint|complex|bool)\w*)"  # the last are dtypes
    r"|(__builtin__|builtins) (set|complex)"
    r"|_codecs encode"
)


class TorchFile:
    """A WeightFile written by torch.save.

    Args:
        path: The file.
        mappable: Whether it is a zip file, which is memory-mapped. Others are read into memory.
    """

    def __init__(self, path: Path, mappable: bool):
        self._path = path
        self._mappable = mappable
        self._lock = threading.Lock()
        self._loaded: Mapping[str, Any] | None = self._load()
        self._read_bytes = 0
        self.tensors = {name: (tuple(value.shape), _dtype_name(value)) for name, value in self._loaded.items()}

    def read(self, name: str) -> np.ndarray:
        """Read a tensor. Safe to call from several threads."""
        with self._lock:
            if self._loaded is None:
                self._loaded, self._read_bytes = self._load(), 0
            tensor = self._loaded[name].detach()
            self._read_bytes += tensor.nbytes
            if self._mappable and self._read_bytes > REMAP_BYTES:
                self._loaded = None  # unmapped when the last array that uses it is freed
        return _to_numpy(tensor)

    def _load(self) -> Mapping[str, Any]:
        """Return the state dict, which may be nested. Raise CheckpointError for a tensor larger than the file."""
        loaded = _torch_load(self._path, self._mappable)
        for key in WRAPPERS:
            if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
                loaded = loaded[key]
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{self._path}: not a weight file (a {type(loaded).__name__}, not named tensors)")
        size = self._path.stat().st_size
        for name, value in loaded.items():
            if not isinstance(name, str) or not hasattr(value, "untyped_storage"):
                raise CheckpointError(f"{self._path}: not a weight file ({name!r} in it is not a tensor)")
            if value.nbytes > size:  # a single element, repeated by strides of zero
                raise CheckpointError(
                    f"{self._path}: {name} has shape {list(value.shape)}, but the file only {size} bytes; "
                    "download it again"
                )
        return loaded


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
        raise _refusal(path, f"refers to {code[1]}" if code else "contains other objects than tensors") from error
    except Exception as error:  # a corrupt file can raise anything
        why = textwrap.shorten((str(error) or type(error).__name__).splitlines()[0], 90, placeholder=" …")
        raise CheckpointError(f"{path}: not a weight file, or a corrupt one ({why}); download it again") from error


def _zip_pickles(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Yield the pickle of a zip file. Raise CheckpointError for entries that are compressed, duplicate or truncated."""
    size = path.stat().st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise CheckpointError(f"{path}: has duplicate zip entries; download it again")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise CheckpointError(
                    f"{path}: compressed or encrypted zip entries are not supported; load the file with torch and save "
                    "it again"
                )
            if entry.file_size != entry.compress_size or entry.header_offset + entry.file_size > size:
                raise CheckpointError(
                    f"{path}: corrupt, the {entry.file_size} bytes of {entry.filename} are not in it; download it again"
                )
        yield from (archive.read(entry) for entry in entries if entry.filename.endswith("/data.pkl"))


def _check_pickle(path: Path, data: bytes | BinaryIO) -> None:
    """Raise CheckpointError if a pickle refers to globals other than ALLOWED_GLOBALS. Does not read beyond its end."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STACK_GLOBAL":  # of pickle protocols that torch.save does not use
            raise _refusal(path, "contains other objects than tensors")
        if opcode.name in ("GLOBAL", "INST") and not ALLOWED_GLOBALS.fullmatch(named := str(argument)):
            raise _refusal(path, f"refers to {named.replace(' ', '.')}")


def _refusal(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: refused: its pickle {why}; nothing was executed. Get the file from a source that you trust, as "
        "safetensors if possible"
    )


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _to_numpy(tensor: Any) -> np.ndarray:
    """Return a numpy view of a torch tensor; torch cannot convert bfloat16 itself."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view("bfloat16")
    return tensor.numpy()
