"""A model in memory: `vllama_jax.load` and `vllama_jax.save`."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

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
    """A loaded model: what `vllama_jax.load` returns. `network` is the Flax module (nn/video_llama.py)."""

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
) -> Model:
    """Loads a model directory, or what a run trained; named, or as `open_model` opened it. "miniature" is shipped.

    dtype: of the weights in memory and so of the computation; float32 on a CPU and bfloat16 elsewhere unless given.
    mesh: from `sharding.make_mesh`; weights are split over its tensor axis, and a warning is logged for each dimension
    that it does not divide. Without one, all is on the first device.
    base: a run's base model, where that has moved.
    quantize: "int8" or "int4" for the large kernels of LLaMA and the ViT, layer by layer as they are read; a quantised
    model directory (checkpoints/quantize.py) needs no telling.
    stacked: leave the language model's layers stacked on axis 0, as they are on disk: for training and saving; answers
    take longer.
    audio_scale: the norm of a sound's vector, the model's own unless given: 20 as published, while training saw
    vectors of norm 1 (docs/miniature.md measures what that does).
    Compiled programs are kept on disk from then on, as `compilation.enable_compilation_cache` has it.
    Raises CheckpointError for what is not a whole model directory, ConfigError for one whose config is not valid.

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

    from vllama_jax.checkpoints.quantize import make_network_to_load
    from vllama_jax.nn.lora import merge_lora
    from vllama_jax.text.tokenizer import check_vocabulary

    directory = remove_missing_branches(path if isinstance(path, ModelDirectory) else open_model(path, base))
    enable_compilation_cache()
    if audio_scale is not None:
        directory = _with_audio_scale(directory, audio_scale)
    check_vocabulary(directory.tokenizer, directory.config.llama.vocab_size)
    network, weights = make_network_to_load(directory, dtype, quantize)
    graph, abstract = nnx.split(network)
    if mesh is not None:
        from vllama_jax import sharding

        for line in sharding.list_indivisible_axes(abstract, mesh, fsdp=False):
            logger.warning(line)
        abstract = sharding.shard_abstract(abstract, mesh, fsdp=False)
    network = nnx.merge(graph, restore(directory, abstract, weights))
    merge_lora(network.llama)
    if not stacked:
        network.llama.unstack()
    return Model(directory.config, directory.tokenizer, network)


def save(model: Model, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a model directory, which `load` and every command read: config, tokenizer, weights and manifest.

    Weights are written as they are in memory, in their dtypes, so that loading them in the same dtype gives the same
    bits. One weight after another is copied to the host, layer by layer where it is stacked.

    A model may be stacked or not, sharded over the devices of this process, and quantized. Low-rank updates (LoRA) are
    added to their kernels, as `load` does, and are no longer apart afterwards. Optimizer state is not written: a run
    directory (`train`) has that.

    Args:
        model: As `load` returned it, or `dataclasses.replace(model, network=...)` with a network that was trained.
        path: The directory to make. It appears when it is complete.
        overwrite: Replace the model directory that is at `path`; anything else there is refused.

    Raises:
        CheckpointError: `path` exists, or cannot be written; or the network's weights are not those of a model of
            `model.config`, or are on the devices of several processes.

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
    """The model without a branch that was never trained: it cannot be used yet."""
    config = directory.config
    for branch in get_branches(config):
        if branch.without is not None and not any(is_within(path, branch.qformer) for path in directory.shapes):
            logger.warning(
                f"{directory.path}: no trained {branch.name} branch in it, so it is not used; train it, or convert a "
                "checkpoint of it"
            )
            config = branch.without(config)
    return dataclasses.replace(directory, config=config)


def _with_audio_scale(directory: ModelDirectory, scale: float) -> ModelDirectory:
    """The same model with sound vectors of another norm. Raises ConfigError where that means nothing."""
    imagebind = directory.config.imagebind
    if imagebind is None:
        raise ConfigError(f"{directory.path}: a picture-only model hears nothing, so there is no audio scale")
    audio = imagebind.audio
    if not 0 < scale <= audio.max_logit_scale:
        raise ConfigError(f"the audio scale must be above 0 and at most {audio.max_logit_scale:g}, not {scale:g}")
    audio = dataclasses.replace(audio, log_logit_scale=math.log(scale))
    imagebind = dataclasses.replace(imagebind, audio=audio)
    return dataclasses.replace(directory, config=dataclasses.replace(directory.config, imagebind=imagebind))
