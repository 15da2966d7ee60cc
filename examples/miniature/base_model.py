"""Store the trained components as files, and write a base model directory from them.

OUT/parts/NAME.npz   the weights of a component by path; a component with a file is not trained again
OUT/base             the base model of the branches; of the branches' weights it has audio_positions and both
                     projections
"""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vllama_jax.checkpoints.arrays import ParamsWriter
from vllama_jax.checkpoints.directory import write_config, write_manifest
from vllama_jax.config import ImageBindConfig, QFormerConfig, VideoLlamaConfig
from vllama_jax.io.atomic import new_directory, replace_file, write_file
from vllama_jax.miniature import audio_tower, captioner, language, towers

VIDEO_QFORMER = QFormerConfig(width=96, depth=2, num_heads=4, mlp_dim=384, num_queries=16)
AUDIO_QFORMER = dataclasses.replace(VIDEO_QFORMER, num_queries=8)

CONFIG = VideoLlamaConfig(
    vit=towers.EVA,
    ln_vision_eps=captioner.LN_VISION_EPS,
    image_qformer=captioner.IMAGE_QFORMER,
    video_qformer=VIDEO_QFORMER,
    num_frame_positions=8,
    audio_qformer=AUDIO_QFORMER,
    imagebind=ImageBindConfig(embed_dim=towers.EMBED_DIM, audio=audio_tower.AUDIO, vision=towers.IMAGEBIND_VISION),
    llama=language.CONFIG,
    template=language.TEMPLATE,
)
Module = TypeVar("Module", bound=nnx.Module)
Weights = dict[str, np.ndarray]


def get_weights(module: nnx.Module) -> Weights:
    """Return the weights of a module by path, such as "blocks/norm1/scale"."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {"/".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in flat}


def set_weights(module: Module, weights: Weights) -> Module:
    """Return the module with other weights, given by path."""
    graph, state = nnx.split(module)
    flat = [
        (path, variable.replace(jnp.asarray(weights["/".join(map(str, path))])))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def load_or_train(folder: Path, name: str, module: Module, train: Callable[[], Module]) -> Module:
    """Load a trained component, or train and store it.

    Args:
        folder: OUT/parts.
        name: The file's name without `.npz`.
        module: A module of the same structure, whose weights are replaced.
        train: Called without a file; returns the trained module.

    Returns:
        The trained module.
    """
    file = folder / f"{name}.npz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        np.savez(data, **get_weights(train()))  # type: ignore[arg-type]  # mypy takes them for `allow_pickle` too
        replace_file(file, data.getbuffer())
    with np.load(file) as weights:
        return set_weights(module, dict(weights))


def write_model(out: Path, weights: Weights, tokenizer: Path, config: VideoLlamaConfig = CONFIG) -> None:
    """Write a model directory.

    Args:
        out: The directory to create.
        weights: All weights of the model, by path.
        tokenizer: The directory of tokenizer.model.
        config: The model's config.

    Raises:
        CheckpointError: `out` exists or cannot be written.
    """
    with new_directory(out) as directory:
        with ParamsWriter(directory / "params") as params:
            for path in sorted(weights):
                values = np.ascontiguousarray(weights[path])
                params.write(path, values.shape, values.dtype, [values])
        (directory / "tokenizer").mkdir()
        write_file(directory / "tokenizer" / "tokenizer.model", (tokenizer / "tokenizer.model").read_bytes())
        write_config(directory, config)
        write_manifest(directory, {}, params.leaves)


def prefix_weights(prefix: str, module: nnx.Module) -> Weights:
    """Return the weights of a component by their paths in the model, which start with `prefix`."""
    return {f"{prefix}/{path}": value for path, value in get_weights(module).items()}
