"""Weight files, read lazily: which tensors a file holds is known at once, a tensor's data when it is asked for."""

import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy a bfloat16, which safetensors then reads)
import numpy as np

from vllama_jax.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs"


class Source:
    """The tensors of one file, or of several files that hold one set: names, shapes, and data on demand."""

    def __init__(self, label: str, files: list[Path]):
        self.label = label
        self.files = files
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._readers: dict[str, Callable[[], np.ndarray]] = {}
        for file in files:
            self._add(file)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def _add(self, file: Path) -> None:
        tensors = _safetensors(file) if _is_safetensors(file) else _torch_tensors(file)
        for name, shape, dtype, read in tensors:
            if name in self._readers:
                raise CheckpointError(f"{file}: {name} is also in another file of {self.label}; remove one of the two")
            self.shapes[name], self.dtypes[name], self._readers[name] = shape, dtype, read


Tensor = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]


def open_file(path: str | Path) -> Source:
    """A `.pth`, `.bin` or `.safetensors` file.

    Raises CheckpointError for a file that is missing, empty, a git-lfs pointer or no weights, for one whose pickle asks
    for code, and for a torch file when torch is not installed.
    """
    path = Path(path)
    check_file(path)
    return Source(path.name, [path])


def open_llama(directory: str | Path) -> Source:
    """The weights of a Hugging Face LLaMA directory: one file or shards, safetensors or `.bin`.

    Raises CheckpointError as `open_file` does, and where no weights are there or a shard is missing.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory; a LLaMA model is a directory with config.json in it")
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        if index.exists():
            files = [directory / shard for shard in sorted(set(_index(index).values()))]
        elif (directory / name).exists():
            files = [directory / name]
        else:
            continue
        for file in files:
            check_file(file)
        return Source(str(directory), files)
    raise CheckpointError(
        f"{directory}: no model.safetensors, pytorch_model.bin or index of their shards; download the weights there"
    )


def check_file(path: Path) -> None:
    """Raises CheckpointError for a path that cannot be a weight file."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if path.is_dir():
        raise CheckpointError(f"{path}: a directory, where a weight file is expected")
    with path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
    if not head:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    if head == LFS_POINTER:
        raise CheckpointError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` where it came from")


def _index(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not an index of shards ({error!r}); download it again") from error


def _is_safetensors(path: Path) -> bool:
    """By content: eight bytes of header length, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _safetensors(path: Path) -> Iterable[Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
        for name in file.keys():  # noqa: SIM118  (not a dict)
            view = file.get_slice(name)
            dtype = _SAFETENSORS_DTYPES[view.get_dtype()]
            yield name, tuple(view.get_shape()), dtype, lambda name=name: file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({error}); download it again") from error
    except KeyError as error:
        raise CheckpointError(f"{path}: tensors of type {error} are not weights that can be converted") from error


_SAFETENSORS_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype("bfloat16"),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "BOOL": np.dtype("bool"),
}


def _torch_tensors(path: Path) -> Iterable[Tensor]:
    for name, value in _unwrap(_torch_load(path)).items():
        if not hasattr(value, "untyped_storage"):
            raise CheckpointError(f"{path}: {name!r} is not a tensor; this is not a file of weights")
        dtype = np.dtype(str(value.dtype).removeprefix("torch."))
        yield name, tuple(value.shape), dtype, lambda value=value: _numpy(value)


def _torch_load(path: Path) -> Any:
    """A torch file with nothing of its pickle executed, memory-mapped where it is a zip (torch ≥ 1.6 writes those)."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path}: to read torch files install torch (pip install 'vllama-jax[convert]'), or give safetensors"
        ) from error
    import pickle

    try:
        return torch.load(path, mmap=zipfile.is_zipfile(path), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() and "unsupported" in str(error).lower():
            raise CheckpointError(
                f"{path}: refused: its pickle asks to run code, which weights never need; nothing of it was run. "
                "Get the file from a source you trust, as safetensors if there is one"
            ) from error
        raise CheckpointError(f"{path}: not a file of weights, or a damaged one ({_first_line(error)})") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: not a file of weights, or a damaged one ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def _unwrap(loaded: Any) -> dict[str, Any]:
    """The tensors themselves: training scripts wrap them as {"model": …} or {"state_dict": …}."""
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            return loaded[key]
    return loaded if isinstance(loaded, dict) else {"": loaded}


def _numpy(tensor: Any) -> np.ndarray:
    """A torch tensor's memory as numpy; numpy gets bfloat16 by its bits."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view("bfloat16")
    return tensor.numpy()
