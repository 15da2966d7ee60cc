"""Video-LLaMA on JAX and Flax: a language model that sees a video and hears its sound.

Names are resolved when they are first used, so that importing this costs nothing.
"""

import importlib
import importlib.metadata
from typing import Any

_HOMES = {
    "Chat": "vllama_jax.chat",
    "MediaReport": "vllama_jax.media",
    "Model": "vllama_jax.checkpoint",
    "load": "vllama_jax.checkpoint",
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
_MODULES = {"chat", "config", "convert", "generate", "media", "quantize", "sharding"}

__all__ = ["__version__", *sorted(_HOMES), *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("vllama-jax")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"vllama_jax.{name}")
    raise AttributeError(f"module 'vllama_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
