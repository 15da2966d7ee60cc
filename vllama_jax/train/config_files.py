"""Load run configs: Python files that define `config = TrainConfig(...)`.

A run config is given by its path, or by its name if it is part of the package (vllama_jax/configs). A preset of its
mesh and batch size may follow the name: `vision_stage1@v5e-256` (presets.py).
"""

import dataclasses
import importlib
import pkgutil
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from vllama_jax import configs
from vllama_jax.errors import ConfigError, suggest_name
from vllama_jax.train import config as train_config
from vllama_jax.train.config import RENAMED_FIELDS, TrainConfig
from vllama_jax.train.presets import STAGES, apply_preset

Prepare = Callable[[TrainConfig, Path], TrainConfig]


def shipped_configs() -> list[str]:
    """List the names of the run configs that are part of the package."""
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def load_config(name: str) -> tuple[TrainConfig, Prepare]:
    """Load a run config.

    Args:
        name: The path of a Python file, or the name of a config that is part of the package, with "@" and a preset's
            name for the mesh and the batch size of that.

    Returns:
        The config, and a function (config, out) → config to call before the run. The function is the file's `prepare`,
        if it defines one, which may create inputs of the run. Otherwise it returns the config unchanged.

    Raises:
        ConfigError: There is no such config or preset, or the config's file fails or does not define one.
    """
    name, preset = split_preset(name)
    fields = _execute(name)
    config = fields.get("config")
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{name}: it does not define `config = TrainConfig(...)`")
    if preset is not None:
        stage = name.rpartition("_")[2]
        if name not in shipped_configs() or stage not in STAGES:
            raise ConfigError(
                f"{name}: presets are for shipped configs of stage 1 and 2; set mesh and batch_size in it"
            )
        config = apply_preset(config, preset, stage)
    return config, fields.get("prepare", lambda config, out: config)


def split_preset(name: str) -> tuple[str, str | None]:
    """Split "vision_stage1@v5e-256" into the names of the config and of the preset; None where there is none."""
    config, mark, preset = name.rpartition("@")
    return (config, preset) if mark and not Path(name).exists() else (name, None)


def _execute(name: str) -> dict[str, Any]:
    try:
        if name in shipped_configs():
            module: ModuleType = importlib.import_module(f"{configs.__name__}.{name}")
            return vars(module)
        if not Path(name).is_file():
            raise ConfigError(
                f"{name}: no such run config; give a Python file, or one of {', '.join(shipped_configs())}"
            )
        return runpy.run_path(name)
    except (SyntaxError, NameError, AttributeError, TypeError, ValueError, ImportError, OSError) as error:
        raise ConfigError(f"{name}: {_unknown_field(error) or f'{type(error).__name__}: {error}'}") from error


def _unknown_field(error: Exception) -> str:
    """Return the message for a field that a config class does not have; "" for any other error."""
    found = re.match(r"(\w+Config)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not found or not hasattr(train_config, found[1]):
        return ""
    fields = [field.name for field in dataclasses.fields(getattr(train_config, found[1]))]
    renamed = (new.rsplit(".", 1)[-1] for old, new in RENAMED_FIELDS.items() if old.rsplit(".", 1)[-1] == found[2])
    if current := next((name for name in renamed if name in fields), ""):
        return f"{found[1]} has no field {found[2]!r}; it is now {current!r}"
    advice = suggest_name(found[2], fields) or f"it has {', '.join(fields)}"
    return f"{found[1]} has no field {found[2]!r}; {advice}"
