"""Write a network as a model directory, one weight at a time."""

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
from vllama_jax.io.atomic import new_directory, replacement_directory, write_file
from vllama_jax.text.tokenizer import Tokenizer, tokenizer_files

if TYPE_CHECKING:
    import jax

    from vllama_jax.nn.video_llama import VideoLlama

MODEL_FILES = ("config.json", "manifest.json", "params")  # only a directory that has them is replaced
MAX_LISTED = 3  # maximum number of weights in a message


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight as it is stored.

    Attributes:
        shape: The shape.
        dtype: The dtype.
        layers: Functions that return the arrays: one for the entire weight, or one for each layer if it is unstacked.
        stacked: Whether the weight has layers on axis 0.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    layers: "list[Callable[[], jax.Array]]"
    stacked: bool

    def blocks(self) -> Iterator[np.ndarray]:
        """Iterate over the rows in order, on the host: one layer at a time, or all rows of a weight without layers."""
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
    """Write a model directory, as `vllama_jax.save` documents.

    Args:
        network: The network.
        config: The model's config.
        tokenizer: The tokenizer, whose files are copied.
        out: The directory to write.
        overwrite: Replace an existing model directory.

    Raises:
        CheckpointError: `out` exists or cannot be written, the weights do not match `config` or are on devices of
            several processes, or the tokenizer's files do not exist.
    """
    weights = _collect_weights(network)
    scheme = _infer_scheme(weights)
    _check_weights(weights, config, scheme)
    files = tokenizer_files(tokenizer.directory) if tokenizer.directory else []
    if not files:
        raise CheckpointError(
            f"{out}: the tokenizer's files are no longer in {tokenizer.directory}; load the model again"
            if tokenizer.directory
            else f"{out}: the tokenizer was not read from a directory; use that of a loaded model"
        )
    if overwrite and out.exists():
        _check_replaceable(out)
    with (replacement_directory if overwrite else new_directory)(out) as directory:
        with ParamsWriter(directory / "params") as params:
            for path in sorted(weights):
                weight = weights[path]
                params.write(path, weight.shape, weight.dtype, weight.blocks())
        (directory / "tokenizer").mkdir()
        for file in files:
            write_file(directory / "tokenizer" / file.name, file.read_bytes())
        write_config(directory, config)
        fields = {"quantized": scheme} if scheme else {}
        write_manifest(directory, {"saved": [{"name": "vllama_jax.save"}]}, params.leaves, **fields)


def _collect_weights(network: "VideoLlama") -> dict[str, _Weight]:
    """Return all weights by path. Unstacked layers are one weight, and LoRA updates are merged into their kernels."""
    from flax import nnx

    layers_by_name: dict[str, list[tuple[Any, Callable[[], jax.Array]]]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(network)):
        if "lora" in path:
            continue
        name = "/".join(str(key) for key in path if not isinstance(key, int))
        layer = functools.reduce(_child, path[:-1], network)
        merges = path[-1] == "kernel" and hasattr(layer, "lora")
        layers_by_name.setdefault(name, []).append((variable, _make_reader(layer if merges else None, variable)))
    return {name: _make_weight(name, layers) for name, layers in layers_by_name.items()}


def _child(module: Any, key: Any) -> Any:
    return module[key] if isinstance(key, int) else getattr(module, key)


def _make_reader(layer: Any, variable: Any) -> "Callable[[], jax.Array]":
    from vllama_jax.nn.lora import merged_kernel

    return variable.get_value if layer is None else functools.partial(merged_kernel, layer)


def _make_weight(name: str, layers: "list[tuple[Any, Callable[[], jax.Array]]]") -> _Weight:
    value = layers[0][0].get_value()
    if not value.is_fully_addressable:
        raise CheckpointError(f"{name}: some shards are on devices of other processes; save a model of one process")
    if value.dtype.name not in STORED_DTYPES:
        raise CheckpointError(f"{name}: dtype {value.dtype.name} cannot be stored; cast it to float32 or bfloat16")
    shape = value.shape if len(layers) == 1 else (len(layers), *value.shape)
    return _Weight(shape, np.dtype(value.dtype), [read for _, read in layers], stacked="/blocks/" in name)


def _infer_scheme(weights: Mapping[str, _Weight]) -> str | None:
    """Infer the quantization from dtypes: int4 values are packed as uint8, but the head is int8 in both schemes."""
    dtypes = {weight.dtype.name for path, weight in weights.items() if path.endswith("/values")}
    return "int4" if "uint8" in dtypes else "int8" if dtypes else None


def _check_weights(weights: Mapping[str, _Weight], config: VideoLlamaConfig, scheme: str | None) -> None:
    """Raise CheckpointError unless the weights are exactly those of a model with this config."""
    from flax import nnx

    abstract = nnx.state(abstract_layers(config, None, scheme)[0])
    expected = {"/".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(abstract)}
    paths_by_problem = {
        "not in a model with its config": sorted(weights.keys() - expected.keys()),
        "missing": sorted(expected.keys() - weights.keys()),
        "shape does not match its config": [
            path for path in sorted(expected.keys() & weights.keys()) if weights[path].shape != expected[path]
        ],
    }
    problems = [
        f"{', '.join(paths[:MAX_LISTED])}{', …' if len(paths) > MAX_LISTED else ''}: {problem}"
        for problem, paths in paths_by_problem.items()
        if paths
    ]
    if problems:
        raise CheckpointError(f"the network cannot be saved as a model: {'; '.join(problems)}")


def _check_replaceable(out: Path) -> None:
    """Raise CheckpointError unless `out` is a model directory, the only thing that is replaced."""
    if not all((out / name).exists() for name in MODEL_FILES):
        raise CheckpointError(f"{out}: exists and is not a model directory; choose another path")
