"""Load and save models: `vllama_jax.load` and `vllama_jax.save`."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllama_jax.branches import get_branches, is_within
from vllama_jax.checkpoints.directory import ModelDirectory, open_model
from vllama_jax.checkpoints.restore import restore
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.errors import ConfigError
from vllama_jax.io.paths import as_path
from vllama_jax.runtime.compilation_cache import enable_compilation_cache

if TYPE_CHECKING:
    import jax

    from vllama_jax.nn.video_llama import VideoLlama
    from vllama_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model, as `vllama_jax.load` returns it.

    Attributes:
        config: The model's config, without branches that have no trained weights.
        tokenizer: The tokenizer of the language model.
        network: The Flax module with the weights (nn/video_llama.py).
    """

    config: VideoLlamaConfig
    tokenizer: "Tokenizer"
    network: "VideoLlama"


def load(
    path: str | Path | ModelDirectory,
    dtype: str | None = None,
    mesh: "jax.sharding.Mesh | None" = None,
    base: str | Path | None = None,
    quantize: str | None = None,
    audio_scale: float | None = None,
    *,
    stacked: bool = False,
    llama_layers: bool = True,
) -> Model:
    """Load a model directory, or the model that a run trained.

    LoRA updates are merged into their kernels. Enables JAX's persistent compilation cache
    (`runtime.compilation_cache`).

    Args:
        path: A model or run directory, or a `ModelDirectory` from `open_model`. "miniature" is the model that is part
            of the package, and hf://org/name[@revision] a repository on the Hugging Face Hub.
        dtype: Dtype of the weights in memory and of the computation; by default float32 on CPUs and bfloat16 elsewhere.
        mesh: A mesh from `sharding.make_mesh`. Weights are sharded over its tensor axis; a dimension that is not
            divisible is replicated, with a warning. By default, all weights are on the first device.
        base: The base model of a run, if it has moved.
        quantize: "int8" or "int4" quantizes the large kernels of LLaMA and the ViT while they are read, one layer at a
            time. A quantized model directory does not need this argument.
        audio_scale: Norm of the audio embeddings; by default the model's own. The published models use 20 for
            inference, but were trained on embeddings of norm 1 (docs/miniature.md measures the effect).
        stacked: Keep the language model's layers stacked on axis 0, as on disk. Use this for training and saving;
            decoding is slower.
        llama_layers: Whether to load all of the language model. Without its layers and its head, the model can embed
            prompts for another engine (`vllama serve --engine`), but not answer them. A 7B model needs 4.0 GB instead
            of 17.2 GB in bfloat16.

    Returns:
        The model.

    Raises:
        CheckpointError: The directory is not a model or run directory, or is incomplete or corrupt, or the repository
            cannot be downloaded.
        ConfigError: Its config, or an argument, is invalid.

    Example:
        >>> import vllama_jax as vl
        >>> model = vl.load("miniature")
        >>> model.config.num_frames
        8
        >>> len(model.network.llama.blocks) == model.config.llama.depth
        True
        >>> stacked = vl.load("miniature", stacked=True)
        >>> stacked.network.llama.blocks.mlp.up.kernel.shape[0] == model.config.llama.depth
        True
    """
    from flax import nnx

    from vllama_jax import sharding
    from vllama_jax.checkpoints.quantize import make_network_to_load
    from vllama_jax.nn.lora import merge_lora
    from vllama_jax.text.tokenizer import check_vocabulary

    directory = remove_missing_branches(path if isinstance(path, ModelDirectory) else open_model(path, base))
    enable_compilation_cache()
    if audio_scale is not None:
        directory = _set_audio_scale(directory, audio_scale)
    check_vocabulary(directory.tokenizer, directory.config.llama.vocab_size)
    network, weights = make_network_to_load(directory, dtype, quantize)
    if not llama_layers:
        network.llama.remove_layers()
    graph, abstract = nnx.split(network)
    if mesh is not None:
        for message in sharding.list_indivisible_axes(abstract, mesh, fsdp=False):
            logger.warning(message)
        abstract = sharding.shard_abstract(abstract, mesh, fsdp=False)
    network = nnx.merge(graph, restore(directory, abstract, weights))
    if llama_layers:
        merge_lora(network.llama)
        if not stacked:
            network.llama.unstack(sharding.get_platform(network))
    return Model(directory.config, directory.tokenizer, network)


def load_copies(
    directory: ModelDirectory, count: int | None, dtype: str | None = None, quantize: str | None = None
) -> list[Model]:
    """Load a model on several devices of this machine, each with a copy.

    Args:
        directory: The model.
        count: The number of devices; None for all.
        dtype: As in `load`.
        quantize: As in `load`.

    Raises:
        ConfigError: There are fewer devices, or an argument is invalid.
        CheckpointError: The model is incomplete or corrupt.
    """
    import jax

    devices = jax.local_devices()
    if count is not None and count > len(devices):
        raise ConfigError(f"--devices {count}, but there are {len(devices)} devices; use fewer, or omit the option")
    loaded, chosen = load(directory, dtype, quantize=quantize), devices[:count]
    return copy_to_devices(loaded, chosen) if len(chosen) > 1 else [loaded]


def copy_to_devices(model: Model, devices: "Sequence[jax.Device]") -> list[Model]:
    """Return the model on each of several devices. It must be on one device; where it is there, it is not copied."""
    import jax
    from flax import nnx
    from jax.experimental.layout import Format

    graph, state = nnx.split(model.network)

    def copy(leaf: Any, device: jax.Device) -> jax.Array:
        if leaf.devices() == {device}:
            return leaf
        moved: Any = jax.device_put(leaf, device)  # in the default layout of the device
        if moved.format.layout != leaf.format.layout:
            moved = jax.device_put(moved, Format(leaf.format.layout, moved.sharding))
        return moved

    def copy_network(device: jax.Device) -> "VideoLlama":
        return nnx.merge(graph, jax.tree.map(lambda leaf: copy(leaf, device), state))

    return [dataclasses.replace(model, network=copy_network(device)) for device in devices]


def save(model: Model, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a model directory: config, tokenizer, weights and manifest. `load` and all commands read it.

    Weights are written in their dtype in memory, so loading them in the same dtype is bit-exact. They are copied to the
    host one weight at a time, and stacked weights one layer at a time.

    The model may be stacked or not, sharded over the devices of this process, and quantized. LoRA updates are merged
    into their kernels. Optimizer state is not written; only run directories (`train`) have it.

    Args:
        model: A model from `load`, or `dataclasses.replace(model, network=...)` with a trained network.
        path: The directory to write. It becomes visible when it is complete.
        overwrite: Replace an existing model directory at `path`. Other files and directories are never replaced.

    Raises:
        CheckpointError: `path` exists or cannot be written, the network's weights do not match `model.config`, or they
            are on devices of several processes.

    Example:
        >>> import vllama_jax as vl
        >>> model = vl.load("miniature", stacked=True)
        >>> vl.save(model, "copy")
        >>> same = vl.load("copy", stacked=True)
        >>> bool((same.network.llama.embedding[...] == model.network.llama.embedding[...]).all())
        True
    """
    from vllama_jax.checkpoints.save import save_network

    save_network(model.network, model.config, model.tokenizer, as_path(path), overwrite=overwrite)


def remove_missing_branches(directory: ModelDirectory) -> ModelDirectory:
    """Remove branches without trained weights from the config of a model directory, with a warning for each."""
    config = directory.config
    for branch in get_branches(config):
        if branch.without is not None and not any(is_within(path, branch.qformer) for path in directory.shapes):
            logger.warning(
                f"{directory.path}: the {branch.name} branch has no trained weights and is not used; train it, or "
                "convert a checkpoint of it"
            )
            config = branch.without(config)
    return dataclasses.replace(directory, config=config)


def _set_audio_scale(directory: ModelDirectory, scale: float) -> ModelDirectory:
    """Set the norm of audio embeddings in the config. Raises ConfigError if it is invalid or there is no audio."""
    imagebind = directory.config.imagebind
    if imagebind is None:
        raise ConfigError(f"{directory.path}: the model has no audio branch; omit the audio scale")
    audio = imagebind.audio
    if not 0 < scale <= audio.max_logit_scale:
        raise ConfigError(f"the audio scale must be above 0 and at most {audio.max_logit_scale:g}, not {scale:g}")
    audio = dataclasses.replace(audio, log_logit_scale=math.log(scale))
    imagebind = dataclasses.replace(imagebind, audio=audio)
    return dataclasses.replace(directory, config=dataclasses.replace(directory.config, imagebind=imagebind))
