"""The command `vllama`. Each command is one file here, whose function's arguments are its flags.

Nothing heavy is imported before a command runs: `--help` answers in under a second.
"""

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "chat": "Talk about a video, a picture or a sound.",
    "convert": "Make a model directory from PyTorch weights.",
    "export": "Write a model or a run as PyTorch weights.",
    "quantize": "Write a model or a run in 8 or 4 bits.",
    "inspect": "Show what a model or a run holds.",
    "verify": "Check a model's files, or compare it with PyTorch.",
    "data": "Build, check and describe training data.",
    "features": "Write what the frozen encoders see, to train from.",
    "train": "Train a branch: stage 1, stage 2, or your own.",
    "memory": "Estimate the memory that a chat or a run needs; nothing is loaded.",
    "compile": "Compile for TPUs that are not here: memory, time, what binds.",
    "eval": "Answer and score a benchmark.",
    "plot": "Draw the loss and learning rate of runs.",
}
EXAMPLE = 'vllama chat clip.mp4 "What is happening?" --model MODEL'


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Exit code 0; 1 with one line on stderr when it failed; 2 with one line for wrong usage; 130 after
    Ctrl-C.
    """
    from vllama_jax.runtime.interrupts import exit_on_interrupt

    with exit_on_interrupt():
        _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> None:
    from vllama_jax.cli._logs import configure_logging
    from vllama_jax.cli._usage import UsageError
    from vllama_jax.errors import VllamaError, format_os_error

    try:
        with configure_logging():
            _run(arguments)
    except UsageError as error:
        print(f"vllama: {error}", file=sys.stderr)
        sys.exit(2)
    except VllamaError as error:
        sys.exit(f"vllama: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone; nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # where no command knows better what to say: a folder that may not be entered, a full disk
        sys.exit(f"vllama: {format_os_error(error)}")


def _run(arguments: list[str]) -> None:
    from vllama_jax.cli import _usage

    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_usage.format_command_list("vllama", COMMANDS, EXAMPLE))
    elif name in ("-V", "--version"):
        import vllama_jax

        print(f"vllama_jax {vllama_jax.__version__}")
    elif name in COMMANDS:
        module = importlib.import_module(f"vllama_jax.cli.{name}")
        if hasattr(module, "select_command"):
            command, prog, rest = module.select_command(rest)
        else:
            command, prog = getattr(module, name), f"vllama {name}"
        _usage.parse(command, prog, rest)()
    else:
        raise _usage.UsageError(f"no command {name!r}{_suggest_command(name)}")


def _suggest_command(name: str) -> str:
    from vllama_jax.errors import suggest_name

    return f"; {suggest_name(name, COMMANDS) or 'there are ' + ', '.join(COMMANDS)}"
