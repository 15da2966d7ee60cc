"""The model config or run config that an argument names: a published size, a directory, or a run config."""

from collections.abc import Callable
from pathlib import Path

from vllama_jax.checkpoints.directory import open_model
from vllama_jax.checkpoints.restore import inference_only_error
from vllama_jax.checkpoints.shipped import MODEL_NAME
from vllama_jax.config import NO_LORA, LoraConfig, VideoLlamaConfig, tiny, video_llama_7b, video_llama_13b
from vllama_jax.errors import ConfigError
from vllama_jax.io.hub import is_hub_address
from vllama_jax.io.paths import as_path
from vllama_jax.model import remove_missing_branches
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.config_files import load_config, shipped_configs, split_preset

SIZES: dict[str, Callable[[], VideoLlamaConfig]] = {"7b": video_llama_7b, "13b": video_llama_13b, "tiny": tiny}
DEFAULT_SIZE = "7b"  # `vllama memory --help` shows the options for a model


def is_model(name_or_path: str) -> bool:
    """Return whether an argument names a published size, a directory or a repository, and not a run config."""
    return name_or_path in (*SIZES, MODEL_NAME) or is_hub_address(name_or_path) or as_path(name_or_path).is_dir()


def load_run_config(name_or_path: str) -> TrainConfig:
    """Load a run config by its name or file.

    Raises:
        ConfigError: There is none.
    """
    name, _ = split_preset(name_or_path)
    if name not in shipped_configs() and not Path(name).is_file():
        known = ", ".join([*SIZES, *shipped_configs()])
        raise ConfigError(
            f"{name_or_path}: no such model or run config; give a model directory, a Python file, or one of {known}"
        )
    return load_config(name_or_path)[0]


def find_model_configs(
    name_or_path: str, base: str
) -> tuple[VideoLlamaConfig, VideoLlamaConfig, LoraConfig, str | None]:
    """Return the config for training and for a chat, the LoRA config, and the quantization scheme (None for none)."""
    if name_or_path in SIZES:
        return SIZES[name_or_path](), SIZES[name_or_path](), NO_LORA, None
    from vllama_jax.checkpoints.quantize import resolve_scheme

    directory = open_model(name_or_path, base or None)
    return directory.config, remove_missing_branches(directory).config, directory.lora, resolve_scheme(directory, None)


def find_trained_model(run: TrainConfig, base: str) -> VideoLlamaConfig:
    """Return the config of the model that a run trains.

    Raises:
        ConfigError: There is no such model, or it is quantized.
    """
    name = base or run.model
    if not (base or is_model(run.model)):
        raise ConfigError(f"{run.model}: no such model directory; give one with --model, or a size: --model 7b")
    model, _, _, scheme = find_model_configs(name, "")
    if scheme:
        raise inference_only_error(name, scheme)
    return model
