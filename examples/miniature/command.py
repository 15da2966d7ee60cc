"""What the commands of this folder share: `python -m vllama_jax.miniature`, and those of its modules."""

from collections.abc import Callable

import tyro

from vllama_jax.errors import exit_on_error
from vllama_jax.runtime.interrupts import exit_on_interrupt


def run_command(program: str, main: Callable[..., None]) -> None:
    """Parse the options of a command and run it. An error is reported in one line, and Ctrl-C ends the process.

    Args:
        program: The name of the module.
        main: Its main function, whose parameters are the options.
    """
    with exit_on_interrupt(until_exit=True), exit_on_error():
        tyro.cli(main, prog=f"python -m {program}")
