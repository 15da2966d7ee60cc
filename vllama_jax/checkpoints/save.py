"""A network in memory → a model directory, one weight after the other."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllama_jax.checkpoints.arrays import STORED_DTYPES, ParamsWriter
from vllama_jax.checkpoints.directory import write_config, write_manifest
from vllama_jax.checkpoints.quantize import abstract_layers
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.errors import CheckpointError
from vllama_jax.io.atomic import make_directory, new_directory, replacement_directory, write_file
from vllama_jax.text.tokenizer import Tokenizer, tokenizer_files

if TYPE_CHECKING:
    import jax

    from vllama_jax.nn.video_llama import VideoLlama

MODEL_FILES = ("config.json", "manifest.json", "params")  # what a directory must have to be replaced
MAX_LISTED = 3  # weights in a message


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight as a model directory has it.

    layers: Functions that return its array: one for the whole weight, or one for each layer of an unstacked one.
    stacked: Whether the first axis is that of layers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    layers: "list[Callable[[], jax.Array]]"
    stacked: bool

    def blocks(self) -> Iterator[np.ndarray]:
        """The rows in order, on the host: a layer at a time where there are layers."""
        for read in self.layers:
            array = read()
            if not self.stacked:
                yield np.ascontiguousarray(array)
            elif len(self.layers) > 1:
                yield np.ascontiguousarray(array)[None]
            else:
                for layer in range(self.shape[0]):
                    yield np.ascontiguousarray(array[layer])[None]


def save_network(
    network: "VideoLlama", config: VideoLlamaConfig, tokenizer: Tokenizer, out: Path, *, overwrite: bool
) -> None:
    """Write a model directory; `vllama_jax.save` has what is written and what is raised."""
    weights = _weights(network)
    scheme = _scheme(weights)
    _check_weights(weights, config, scheme)
    files = tokenizer_files(tokenizer.directory) if tokenizer.directory else []
    if not files:
        raise CheckpointError(
            f"{out}: the tokenizer's files are not in {tokenizer.directory} any more; load the model again"
            if tokenizer.directory
            else f"{out}: the tokenizer was not read from a directory; take that of a loaded model"
        )
    if overwrite and out.exists():
        _check_replaceable(out)
    with (replacement_directory if overwrite else new_directory)(out) as directory:
        with ParamsWriter(directory / "params") as params:
            for path in sorted(weights):
                weight = weights[path]
                params.write(path, weight.shape, weight.dtype, weight.blocks())
        make_directory(directory / "tokenizer")
        for file in files:
            write_file(directory / "tokenizer" / file.name, file.read_bytes())
        write_config(directory, config)
        more = {"quantized": scheme} if scheme else {}
        write_manifest(directory, {"saved": [{"name": "vllama_jax.save"}]}, params.leaves, **more)


def _weights(network: "VideoLlama") -> dict[str, _Weight]:
    """All weights by path, layers that were unstacked as one, low-rank updates as part of their kernels."""
    from flax import nnx

    found: dict[str, list[tuple[Any, Callable[[], jax.Array]]]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(network)):
        if "lora" in path:
            continue
        name = "/".join(str(key) for key in path if not isinstance(key, int))
        layer = functools.reduce(_child, path[:-1], network)
        merges = path[-1] == "kernel" and hasattr(layer, "lora")
        found.setdefault(name, []).append((variable, _reader(layer if merges else None, variable)))
    return {name: _weight(name, layers) for name, layers in found.items()}


def _child(module: Any, key: Any) -> Any:
    return module[key] if isinstance(key, int) else getattr(module, key)


def _reader(layer: Any, variable: Any) -> "Callable[[], jax.Array]":
    from vllama_jax.nn.lora import merged_kernel

    return variable.get_value if layer is None else functools.partial(merged_kernel, layer)


def _weight(name: str, layers: "list[tuple[Any, Callable[[], jax.Array]]]") -> _Weight:
    value = layers[0][0].get_value()
    if not value.is_fully_addressable:
        raise CheckpointError(f"{name}: a part of it is on another process's devices; save a model of one process")
    if value.dtype.name not in STORED_DTYPES:
        raise CheckpointError(f"{name}: {value.dtype.name} weights cannot be stored; cast it to float32 or bfloat16")
    shape = value.shape if len(layers) == 1 else (len(layers), *value.shape)
    return _Weight(shape, np.dtype(value.dtype), [read for _, read in layers], stacked="/blocks/" in name)


def _scheme(weights: Mapping[str, _Weight]) -> str | None:
    """How the large kernels are quantized; the head has 8 bits in both schemes."""
    kinds = {weight.dtype.name for path, weight in weights.items() if path.endswith("/values")}
    return "int4" if "uint8" in kinds else "int8" if kinds else None


def _check_weights(weights: Mapping[str, _Weight], config: VideoLlamaConfig, scheme: str | None) -> None:
    """Raise CheckpointError unless these are all weights of a model of this config."""
    from flax import nnx

    abstract = nnx.state(abstract_layers(config, None, scheme)[0])
    needed = {"/".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(abstract)}
    problems = {
        "no weight of a model of its config": sorted(weights.keys() - needed.keys()),
        "missing": sorted(needed.keys() - weights.keys()),
        "of another shape than its config says": [
            path for path in sorted(needed.keys() & weights.keys()) if weights[path].shape != needed[path]
        ],
    }
    told = [
        f"{', '.join(paths[:MAX_LISTED])}{', …' if len(paths) > MAX_LISTED else ''}: {what}"
        for what, paths in problems.items()
        if paths
    ]
    if told:
        raise CheckpointError(f"the network cannot be saved as a model: {'; '.join(told)}")


def _check_replaceable(out: Path) -> None:
    """Raise CheckpointError unless `out` is a model directory: nothing else is ever replaced."""
    if not all((out / name).exists() for name in MODEL_FILES):
        raise CheckpointError(f"{out}: exists and is not a model directory; choose another place")
