"""Quantize the large kernels of LLaMA and the ViT to int8 or int4, while a model is loaded or as a model directory.

In a quantized model directory, such a kernel is stored as two weights, `values` and `scale` (nn/quantized.py), and
manifest.json has the field "quantized". It can be loaded for inference. Training and export need the original model.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllama_jax.checkpoints.arrays import ParamsWriter, check_params
from vllama_jax.checkpoints.directory import ModelDirectory, write_config, write_manifest
from vllama_jax.checkpoints.reader import RowReader, make_row_reader, stored_dtype
from vllama_jax.checkpoints.restore import RestoreFunction, check_leaves, restore_weights, with_default_sharding
from vllama_jax.config import NO_LORA, LoraConfig, VideoLlamaConfig
from vllama_jax.errors import ConfigError
from vllama_jax.io.atomic import new_directory, write_file
from vllama_jax.io.paths import as_path
from vllama_jax.nn.network import abstract_network

if TYPE_CHECKING:
    import jax

    from vllama_jax.nn.quantized import QuantizedLinear
    from vllama_jax.nn.video_llama import VideoLlama

BITS = {"int8": 8, "int4": 4}
QUANTIZED_WEIGHTS = ("values", "scale")
QuantizedLayers = Mapping[str, "QuantizedLinear"]


def resolve_scheme(directory: ModelDirectory, requested: str | None) -> str | None:
    """Determine the quantization of the weights in memory.

    Args:
        directory: The model directory.
        requested: The requested quantization; None for that of the model directory.

    Returns:
        "int8" or "int4"; None for no quantization.

    Raises:
        ConfigError: The quantization is unknown, or the model directory has another one.
    """
    stored = directory.quantized
    for scheme in (requested, stored):
        if scheme not in (None, *BITS):
            raise ConfigError(f"{directory.path}: weights can be quantized to {' or '.join(BITS)}, not {scheme!r}")
    if stored and requested not in (None, stored):
        raise ConfigError(f"{directory.path}: its weights are already {stored}; use the original model")
    return requested or stored


def make_network_to_load(
    directory: ModelDirectory, dtype: str | None, requested: str | None
) -> "tuple[VideoLlama, RestoreFunction | None]":
    """Create the abstract network for loading a model.

    Args:
        directory: The model directory.
        dtype: Dtype of weights that are not quantized; None for the default.
        requested: The requested quantization; None for that of the model directory.

    Returns:
        The network with abstract weights, and the function that restores them if they are quantized while they are
        read, else None. A quantized network has no LoRA updates, as they are merged before its kernels are quantized.

    Raises:
        ConfigError: The quantization is unknown, or the model directory has another one.
    """
    scheme = resolve_scheme(directory, requested)
    lora = NO_LORA if scheme else directory.lora
    network, layers = abstract_layers(directory.config, dtype, scheme, lora)
    quantizes = scheme is not None and not directory.quantized
    return network, functools.partial(_restore_weights, layers) if quantizes else None


def abstract_layers(
    config: VideoLlamaConfig, dtype: str | None, scheme: str | None, lora: LoraConfig = NO_LORA
) -> "tuple[VideoLlama, QuantizedLayers]":
    """Create a network with abstract weights, and return it with its quantized layers by path.

    Args:
        config: The model's config.
        dtype: Dtype of weights that are not quantized; None for the default.
        scheme: "int8" or "int4"; None for no quantization.
        lora: Config of LoRA.
    """
    from vllama_jax.nn.quantized import quantize_layers

    network = abstract_network(config, dtype, lora)
    return network, quantize_layers(network, BITS[scheme]) if scheme else {}


def _restore_weights(
    layers: QuantizedLayers, directory: ModelDirectory, abstract: dict[str, Any]
) -> "dict[str, jax.Array]":
    """Restore weights as `restore_weights` does, but quantize the kernels of `layers` on the device, layer by layer."""
    read = make_row_reader(directory)
    layers = {path: layer for path, layer in layers.items() if f"{path}/values" in abstract}
    _check_kernels(directory, layers)
    quantized = {f"{path}/{weight}" for path in layers for weight in QUANTIZED_WEIGHTS}
    restored = restore_weights(directory, {path: abstract[path] for path in abstract if path not in quantized})
    for path, layer in layers.items():
        names = [f"{path}/{weight}" for weight in QUANTIZED_WEIGHTS]
        leaves = tuple(with_default_sharding(abstract[name]) for name in names)
        restored |= zip(names, _quantize_to_devices(read, path, layer, leaves), strict=True)
    return restored


def _check_kernels(directory: ModelDirectory, layers: QuantizedLayers) -> None:
    """Raise CheckpointError unless the kernels have the right shapes and complete files."""
    kernels = {f"{path}/kernel": layer.kernel_shape for path, layer in layers.items()}
    check_leaves(directory, kernels)
    trained = {path for run in directory.trained for path in run.leaves}
    check_params(directory.path / "params", directory.manifest["leaves"], sorted(kernels.keys() - trained))


def _quantize_to_devices(
    read: RowReader, path: str, layer: "QuantizedLinear", leaves: "tuple[jax.ShapeDtypeStruct, ...]"
) -> "tuple[jax.Array, ...]":
    """Quantize a kernel to values and scales with the shardings of `leaves`. Keeps only one layer of it in memory."""
    import jax
    import jax.numpy as jnp

    shardings = tuple(leaf.sharding for leaf in leaves)
    rows = quantized_rows(read, path, layer, functools.partial(_put, shardings[0], layer))
    if not is_stacked(path):
        return jax.device_put(next(rows), shardings)

    def set_layer(stack: tuple[jax.Array, ...], row: tuple[jax.Array, ...], number: int) -> tuple[jax.Array, ...]:
        return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, number, 0), stack, row)

    compiled = jax.jit(set_layer, donate_argnums=0, out_shardings=shardings)
    stack = tuple(jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) for leaf in leaves)
    for number, row in enumerate(rows):
        stack = jax.block_until_ready(compiled(stack, row, number))
    return stack


def _put(sharding: "jax.sharding.Sharding", layer: "QuantizedLinear", kernel: np.ndarray) -> "jax.Array":
    """Move one layer's kernel to devices, sharded as its values are."""
    import jax
    from jax.sharding import NamedSharding

    from vllama_jax.sharding import AXIS_NAMES, partition_spec

    if isinstance(sharding, NamedSharding):
        names = layer.values.get_metadata()[AXIS_NAMES]
        sharding = NamedSharding(sharding.mesh, partition_spec(kernel.shape, names, sharding.mesh, fsdp=False))
    return jax.device_put(kernel, sharding)


def is_stacked(path: str) -> bool:
    """Return whether the weight at a path is stacked over layers on axis 0."""
    return "/blocks/" in path


def quantized_rows(
    read: RowReader, path: str, layer: "QuantizedLinear", put: Callable[[np.ndarray], Any] = lambda kernel: kernel
) -> "Iterator[tuple[jax.Array, jax.Array]]":
    """Quantize a kernel, layer by layer if it is stacked.

    Args:
        read: Reads the kernel's rows.
        path: The path of the layer.
        layer: The quantized layer.
        put: Function that moves a row to devices.

    Yields:
        The values and scales of each row.
    """
    from vllama_jax.nn.quantized import quantize_kernel

    for row in range(layer.kernel_shape[0]) if is_stacked(path) else [None]:
        yield quantize_kernel(put(read(f"{path}/kernel", row)), layer.inputs, layer.bits)


def make_quantizing_reader(directory: ModelDirectory, layers: QuantizedLayers) -> RowReader:
    """Create a reader of weights or rows of them, which quantizes the kernels of layers.

    Args:
        directory: The model directory.
        layers: The quantized layers by path.
    """
    from vllama_jax.nn.quantized import quantize_kernel

    read = make_row_reader(directory)

    @functools.lru_cache(maxsize=1)
    def read_quantized(path: str, row: int | None) -> dict[str, np.ndarray]:
        weights = quantize_kernel(read(f"{path}/kernel", row), layers[path].inputs, layers[path].bits)
        return dict(zip(QUANTIZED_WEIGHTS, map(np.asarray, weights), strict=True))

    def read_any(name: str, row: int | None) -> np.ndarray:
        path, _, weight = name.rpartition("/")
        return read_quantized(path, row)[weight] if path in layers and weight in QUANTIZED_WEIGHTS else read(name, row)

    return read_any


def unquantized_shapes(directory: ModelDirectory) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all weights by path; for a quantized model, those of the original model.

    Raises:
        CheckpointError: A quantized weight is missing or has another shape.
    """
    if not directory.quantized:
        return directory.shapes
    layers = abstract_layers(directory.config, None, resolve_scheme(directory, None))[1]
    quantized = {
        f"{path}/{name}": getattr(layer, name).shape for path, layer in layers.items() for name in QUANTIZED_WEIGHTS
    }
    check_leaves(directory, quantized)
    others = {path: shape for path, shape in directory.shapes.items() if path not in quantized}
    return others | {f"{path}/kernel": layer.kernel_shape for path, layer in layers.items()}


# Quantized model directories


def quantize(
    model: ModelDirectory, out: str | Path, scheme: str, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Write a quantized model directory. It becomes visible when it is complete.

    Args:
        model: A model directory, or a run directory opened as a model.
        out: The directory to write.
        scheme: "int8" or "int4".
        progress: Called with the number of bytes read since its last call; the total is `bytes_to_read(model)`.

    Raises:
        ConfigError: The model is already quantized, or `scheme` is unknown.
        CheckpointError: The model cannot be read, or `out` exists or cannot be written.
    """
    if model.quantized:
        raise ConfigError(f"{model.path}: its weights are already {model.quantized}; use the original model")
    layers = abstract_layers(model.config, None, resolve_scheme(model, scheme))[1]
    _check_kernels(model, layers)
    read = make_row_reader(model)
    with new_directory(as_path(out)) as directory:
        with ParamsWriter(directory / "params") as params:
            for path in _list_stored_paths(model):
                layer = layers.get(path.removesuffix("/kernel"))
                if layer is None:
                    _copy(params, model, read, path)
                else:
                    _write_quantized(params, read, path.removesuffix("/kernel"), layer)
                progress(_stored_bytes(model, path))
        (directory / "tokenizer").mkdir()
        for file in (model.path / "tokenizer").iterdir():
            write_file(directory / "tokenizer" / file.name, file.read_bytes())
        write_config(directory, model.config)
        write_manifest(directory, model.manifest["sources"], params.leaves, quantized=scheme)


def bytes_to_read(model: ModelDirectory) -> int:
    """Return the number of bytes that `quantize` reads."""
    return sum(_stored_bytes(model, path) for path in _list_stored_paths(model))


def _list_stored_paths(model: ModelDirectory) -> list[str]:
    """List the weights to write: all but LoRA updates, which are merged into their kernels."""
    return sorted(path for path in model.shapes if "/lora/" not in path)


def _stored_bytes(model: ModelDirectory, path: str) -> int:
    return math.prod(model.shapes[path]) * stored_dtype(model, path).itemsize


def _copy(params: ParamsWriter, model: ModelDirectory, read: RowReader, path: str) -> None:
    shape = model.shapes[path]
    by_layer = len(shape) > 2 and is_stacked(path)
    rows = (read(path, row)[None] for row in range(shape[0])) if by_layer else [read(path, None)]
    params.write(path, shape, stored_dtype(model, path), rows)


def _write_quantized(params: ParamsWriter, read: RowReader, path: str, layer: "QuantizedLinear") -> None:
    scales = []  # kept in memory, so that the kernel is read only once

    def values() -> Iterator[np.ndarray]:
        for row in quantized_rows(read, path, layer):
            block, scale = (np.asarray(array)[None] if is_stacked(path) else np.asarray(array) for array in row)
            scales.append(scale)
            yield block

    params.write(f"{path}/values", layer.values.shape, np.dtype(layer.values.dtype), values())
    params.write(f"{path}/scale", layer.scale.shape, np.dtype(np.float32), scales)
