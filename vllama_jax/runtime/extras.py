"""Import optional dependencies, which are installed as extras: pip install 'vllama-jax[convert]'."""

import importlib
from types import ModuleType

from vllama_jax.errors import VllamaError


def import_extra(name: str, extra: str, use: str, error: type[VllamaError], instead: str = "") -> ModuleType:
    """Import a module of an optional dependency.

    Args:
        name: The module.
        extra: The extra that installs it.
        use: What needs it, for the start of the message: "a.pth: reading torch files".
        error: The exception to raise.
        instead: What the user can do without it, appended to the message.

    Returns:
        The module.

    Raises:
        error: It is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        missing = isinstance(problem, ModuleNotFoundError) and (problem.name or name).startswith(name.partition(".")[0])
        why = "which is not installed" if missing else f"which cannot be imported ({problem})"
        instead = f"; or {instead}" if instead else ""
        package = name.partition(".")[0]
        raise error(f"{use} needs {package}, {why}: pip install 'vllama-jax[{extra}]'{instead}") from problem
