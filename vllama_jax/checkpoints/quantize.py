"""Quantised models: the large kernels of LLaMA and the ViT in 8 or 4 bits, made as they are loaded, or stored.

In a quantised model directory such a kernel is two weights, `values` and `scale` (nn/quantized.py), and manifest.json
says "quantized". It is for loading: training, exporting and the like need the model that it was made from.
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
from vllama_jax.io.atomic import make_directory, new_directory, write_file
from vllama_jax.io.paths import as_path
from vllama_jax.nn.network import abstract_network

if TYPE_CHECKING:
    import jax

    from vllama_jax.nn.quantized import QuantizedLinear
    from vllama_jax.nn.video_llama import VideoLlama

BITS = {"int8": 8, "int4": 4}
QUANTIZED_WEIGHTS = ("values", "scale")
QuantizedLayers = Mapping[str, "QuantizedLinear"]


def resolve_scheme(directory: ModelDirectory, asked: str | None) -> str | None:
    """How the weights are to be in memory. Raises ConfigError where that is not known, or not what is stored."""
    stored = directory.quantized
    for scheme in (asked, stored):
        if scheme not in (None, *BITS):
            raise ConfigError(f"{directory.path}: weights can be quantised to {' or '.join(BITS)}, not {scheme!r}")
    if stored and asked not in (None, stored):
        raise ConfigError(f"{directory.path}: its weights are {stored} already; take the model that it was made from")
    return asked or stored


def make_network_to_load(
    directory: ModelDirectory, dtype: str | None, asked: str | None
) -> "tuple[VideoLlama, RestoreFunction | None]":
    """The network to load, with shapes in place of weights, and what reads those where it quantises them.

    Updates of low rank are part of a kernel before it is quantised, so there are none then.
    """
    scheme = resolve_scheme(directory, asked)
    lora = NO_LORA if scheme else directory.lora
    network, layers = abstract_layers(directory.config, dtype, scheme, lora)
    making = scheme is not None and not directory.quantized
    return network, functools.partial(_restore_weights, layers) if making else None


def abstract_layers(
    config: VideoLlamaConfig, dtype: str | None, scheme: str | None, lora: LoraConfig = NO_LORA
) -> "tuple[VideoLlama, QuantizedLayers]":
    """A network with shapes in place of weights, and its quantised layers by path."""
    from vllama_jax.nn.quantized import quantize_layers

    network = abstract_network(config, dtype, lora)
    return network, quantize_layers(network, BITS[scheme]) if scheme else {}


def _restore_weights(
    layers: QuantizedLayers, directory: ModelDirectory, wanted: dict[str, Any]
) -> "dict[str, jax.Array]":
    """`restore_weights`, with the kernels of `layers` quantised on the device, one layer after the other."""
    read = make_row_reader(directory)
    _check_kernels(directory, layers)
    made = {f"{path}/{weight}" for path in layers for weight in QUANTIZED_WEIGHTS}
    restored = restore_weights(directory, {path: wanted[path] for path in wanted if path not in made})
    for path, layer in layers.items():
        names = [f"{path}/{weight}" for weight in QUANTIZED_WEIGHTS]
        places = tuple(with_default_sharding(wanted[name]) for name in names)
        restored |= zip(names, _quantized_leaf(read, path, layer, places), strict=True)
    return restored


def _check_kernels(directory: ModelDirectory, layers: QuantizedLayers) -> None:
    """Raises CheckpointError unless the kernels are there, of the right shape, and their files whole."""
    kernels = {f"{path}/kernel": layer.kernel_shape for path, layer in layers.items()}
    check_leaves(directory, kernels)
    trained = {path for run in directory.trained for path in run.leaves}
    check_params(directory.path / "params", directory.manifest["leaves"], sorted(kernels.keys() - trained))


def _quantized_leaf(
    read: RowReader, path: str, layer: "QuantizedLinear", places: "tuple[jax.ShapeDtypeStruct, ...]"
) -> "tuple[jax.Array, ...]":
    """Values and scales of a kernel in their places. In memory beside them is one layer of it."""
    import jax
    import jax.numpy as jnp

    shardings = tuple(place.sharding for place in places)
    rows = quantized_rows(read, path, layer, functools.partial(_put, shardings[0], layer))
    if not is_stacked(path):
        return jax.device_put(next(rows), shardings)

    def written(whole: tuple[jax.Array, ...], row: tuple[jax.Array, ...], number: int) -> tuple[jax.Array, ...]:
        return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, number, 0), whole, row)

    write = jax.jit(written, donate_argnums=0, out_shardings=shardings)
    whole = tuple(jnp.zeros(place.shape, place.dtype, device=place.sharding) for place in places)
    for number, row in enumerate(rows):
        whole = jax.block_until_ready(write(whole, row, number))
    return whole


def _put(sharding: "jax.sharding.Sharding", layer: "QuantizedLinear", kernel: np.ndarray) -> "jax.Array":
    """One layer's kernel on the devices that its values are for, split as they are."""
    import jax
    from jax.sharding import NamedSharding

    from vllama_jax.sharding import AXIS_NAMES, partition_spec

    if isinstance(sharding, NamedSharding):
        names = layer.values.get_metadata()[AXIS_NAMES]
        sharding = NamedSharding(sharding.mesh, partition_spec(kernel.shape, names, sharding.mesh, fsdp=False))
    return jax.device_put(kernel, sharding)


def is_stacked(path: str) -> bool:
    return "/blocks/" in path


def quantized_rows(
    read: RowReader, path: str, layer: "QuantizedLinear", place: Callable[[np.ndarray], Any] = lambda kernel: kernel
) -> "Iterator[tuple[jax.Array, jax.Array]]":
    """Values and scales of a layer's kernel, layer by layer where it is stacked."""
    from vllama_jax.nn.quantized import quantized

    for row in range(layer.kernel_shape[0]) if is_stacked(path) else [None]:
        yield quantized(place(read(f"{path}/kernel", row)), layer.inputs, layer.bits)


def make_quantizing_reader(directory: ModelDirectory, layers: QuantizedLayers) -> RowReader:
    """Reads the weights of a network with quantised layers, which it quantises itself, or one row of theirs."""
    from vllama_jax.nn.quantized import quantized

    read = make_row_reader(directory)

    @functools.lru_cache(maxsize=1)
    def made(path: str, row: int | None) -> dict[str, np.ndarray]:
        parts = quantized(read(f"{path}/kernel", row), layers[path].inputs, layers[path].bits)
        return dict(zip(QUANTIZED_WEIGHTS, map(np.asarray, parts), strict=True))

    def one(name: str, row: int | None) -> np.ndarray:
        path, _, weight = name.rpartition("/")
        return made(path, row)[weight] if path in layers and weight in QUANTIZED_WEIGHTS else read(name, row)

    return one


def unquantized_shapes(directory: ModelDirectory) -> dict[str, tuple[int, ...]]:
    """Of every weight of the model that a quantised one was made from; of another, its own.

    Raises CheckpointError where a quantised weight is missing or misshapen.
    """
    if not directory.quantized:
        return directory.shapes
    layers = abstract_layers(directory.config, None, resolve_scheme(directory, None))[1]
    made = {
        f"{path}/{name}": getattr(layer, name).shape for path, layer in layers.items() for name in QUANTIZED_WEIGHTS
    }
    check_leaves(directory, made)
    kept = {path: shape for path, shape in directory.shapes.items() if path not in made}
    return kept | {f"{path}/kernel": layer.kernel_shape for path, layer in layers.items()}


# Stored


def quantize(
    model: ModelDirectory, out: str | Path, scheme: str, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Writes a model, or what a run trained, as a quantised model directory; `out` appears when it is whole.

    progress: called with the bytes read since, of `bytes_to_read`.
    Raises ConfigError where the model is quantised already, CheckpointError where it cannot be read or `out` written.
    """
    if model.quantized:
        raise ConfigError(f"{model.path}: its weights are {model.quantized} already")
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
        make_directory(directory / "tokenizer")
        for file in (model.path / "tokenizer").iterdir():
            write_file(directory / "tokenizer" / file.name, file.read_bytes())
        write_config(directory, model.config)
        write_manifest(directory, model.manifest["sources"], params.leaves, quantized=scheme)


def bytes_to_read(model: ModelDirectory) -> int:
    return sum(_stored_bytes(model, path) for path in _list_stored_paths(model))


def _list_stored_paths(model: ModelDirectory) -> list[str]:
    """All weights but updates of low rank, which are added to their kernels."""
    return sorted(path for path in model.shapes if "/lora/" not in path)


def _stored_bytes(model: ModelDirectory, path: str) -> int:
    return math.prod(model.shapes[path]) * stored_dtype(model, path).itemsize


def _copy(params: ParamsWriter, model: ModelDirectory, read: RowReader, path: str) -> None:
    shape = model.shapes[path]
    by_layer = len(shape) > 2 and is_stacked(path)
    rows = (read(path, row)[None] for row in range(shape[0])) if by_layer else [read(path, None)]
    params.write(path, shape, stored_dtype(model, path), rows)


def _write_quantized(params: ParamsWriter, read: RowReader, path: str, layer: "QuantizedLinear") -> None:
    scales = []  # small; kept, so that the kernel is read once

    def values() -> Iterator[np.ndarray]:
        for row in quantized_rows(read, path, layer):
            found, scale = (np.asarray(part)[None] if is_stacked(path) else np.asarray(part) for part in row)
            scales.append(scale)
            yield found

    params.write(f"{path}/values", layer.values.shape, np.dtype(layer.values.dtype), values())
    params.write(f"{path}/scale", layer.scale.shape, np.dtype(np.float32), scales)
