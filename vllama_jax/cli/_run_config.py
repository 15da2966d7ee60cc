"""The run config that the first argument of a command names: a Python file, or the name of a shipped config."""

from vllama_jax.cli._usage import UsageError
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.config_files import Prepare, load_config

DEFAULT_CONFIG = "vision_stage1"


def load_named_config(arguments: list[str], command: str) -> tuple[TrainConfig, Prepare]:
    """Load the run config that the first argument names, or `DEFAULT_CONFIG` if only help is asked for.

    Args:
        arguments: The arguments of the command.
        command: A complete example of the command, for the error message.

    Raises:
        UsageError: The first argument is an option, or there is none.
        ConfigError: The config cannot be loaded (see `load_config`).
    """
    first = require_first_argument(arguments, f"give a run config (a file or a name) first: `{command}`")
    return load_config(first or DEFAULT_CONFIG)


def require_first_argument(arguments: list[str], advice: str) -> str | None:
    """Return the first argument, which determines the options of the command, or None if only help is asked for.

    Args:
        arguments: The arguments of the command.
        advice: The message of the error.

    Raises:
        UsageError: The first argument is an option, or there is none.
    """
    first = next(iter(arguments), "-")
    if not first.startswith("-"):
        return first
    if any(argument in ("-h", "--help") for argument in arguments):
        return None
    raise UsageError(advice)
