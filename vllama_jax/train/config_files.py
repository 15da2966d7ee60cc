"""Run configs: Python files that define `config = TrainConfig(...)`, named by path or, when shipped, by name."""

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

Prepare = Callable[[TrainConfig, Path], TrainConfig]


def shipped_configs() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def load_config(name: str) -> tuple[TrainConfig, Prepare]:
    """The config, and what has to be done before its run: nothing, unless its file defines `prepare(config, out)`.

    Raises ConfigError when there is no such config, or when its file does not define one.
    """
    fields = _execute(name)
    config = fields.get("config")
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{name}: it does not define `config = TrainConfig(...)`")
    return config, fields.get("prepare", lambda config, out: config)


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
    """What is wrong, where a config class was given a field that it does not have."""
    found = re.match(r"(\w+Config)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not found or not hasattr(train_config, found[1]):
        return ""
    fields = [field.name for field in dataclasses.fields(getattr(train_config, found[1]))]
    renamed = (new.rsplit(".", 1)[-1] for old, new in RENAMED_FIELDS.items() if old.rsplit(".", 1)[-1] == found[2])
    if current := next((name for name in renamed if name in fields), ""):
        return f"{found[1]} has no field {found[2]!r}; it is now {current!r}"
    advice = suggest_name(found[2], fields) or f"it has {', '.join(fields)}"
    return f"{found[1]} has no field {found[2]!r}; {advice}"
