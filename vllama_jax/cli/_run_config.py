"""A run config, named by path or, when it is shipped, by name; and its fields as flags."""

from vllama_jax.cli._usage import UsageError
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.config_files import Prepare, load_config

DEFAULT_CONFIG = "vision_stage1"


def load_named_config(arguments: list[str], command: str) -> tuple[TrainConfig, Prepare]:
    """Load the config that the first argument names; for help, a default one, whose flags are shown.

    Args:
        arguments: Of the command, whose first argument is a run config.
        command: An example of a whole command.

    Raises:
        UsageError: The first argument is an option, or there is none.
        ConfigError: As `load_config`.
    """
    first = require_first_argument(arguments, f"name a run config first: `{command}`, or a Python file")
    return load_config(first or DEFAULT_CONFIG)


def require_first_argument(arguments: list[str], advice: str) -> str | None:
    """Return the first argument, whose value decides which options a command has; None where help is asked for alone.

    Raises UsageError, with the advice, when it is an option or there is none.
    """
    first = next(iter(arguments), "-")
    if not first.startswith("-"):
        return first
    if any(argument in ("-h", "--help") for argument in arguments):
        return None
    raise UsageError(advice)
