"""Video-LLaMA on JAX and Flax: a language model that answers questions about images, video and audio.

Public names are imported on first use, so importing the package imports neither jax nor any of its modules.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (a checkout can be run with any Python; this file and __main__ parse on 3.8)
    raise ImportError(
        "vllama_jax needs Python 3.11 or newer; this is Python {}.{}".format(*sys.version_info), name=__name__
    )

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllama_jax import chat, config, convert, embed, generate, media, media_tokens, sharding
    from vllama_jax.chat import Chat
    from vllama_jax.checkpoints import quantize
    from vllama_jax.config import GenerationConfig, VideoLlamaConfig
    from vllama_jax.embed import embed_files
    from vllama_jax.errors import ArrayError, CheckpointError, ConfigError, DataError, MediaError, VllamaError
    from vllama_jax.media import MediaReport
    from vllama_jax.model import Model, load, save
    from vllama_jax.nn.video_llama import VideoLlama
    from vllama_jax.train import train

    __version__: str

_ATTRIBUTES = {
    "Chat": "vllama_jax.chat",
    "MediaReport": "vllama_jax.media",
    "Model": "vllama_jax.model",
    "embed_files": "vllama_jax.embed",
    "load": "vllama_jax.model",
    "save": "vllama_jax.model",
    "VideoLlama": "vllama_jax.nn.video_llama",
    "VideoLlamaConfig": "vllama_jax.config",
    "GenerationConfig": "vllama_jax.config",
    "ArrayError": "vllama_jax.errors",
    "ConfigError": "vllama_jax.errors",
    "CheckpointError": "vllama_jax.errors",
    "DataError": "vllama_jax.errors",
    "MediaError": "vllama_jax.errors",
    "VllamaError": "vllama_jax.errors",
}
_MODULES = {
    "chat": "vllama_jax.chat",
    "config": "vllama_jax.config",
    "convert": "vllama_jax.convert",
    "embed": "vllama_jax.embed",
    "generate": "vllama_jax.generate",
    "media": "vllama_jax.media",
    "media_tokens": "vllama_jax.media_tokens",
    "quantize": "vllama_jax.checkpoints.quantize",
    "sharding": "vllama_jax.sharding",
    "train": "vllama_jax.train",
}

__all__ = [
    "ArrayError",
    "Chat",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GenerationConfig",
    "MediaError",
    "MediaReport",
    "Model",
    "VideoLlama",
    "VideoLlamaConfig",
    "VllamaError",
    "__version__",
    "chat",
    "config",
    "convert",
    "embed",
    "embed_files",
    "generate",
    "load",
    "media",
    "media_tokens",
    "quantize",
    "save",
    "sharding",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("vllama-jax")
    if name in _ATTRIBUTES:
        return getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'vllama_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
