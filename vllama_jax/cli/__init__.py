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
    "inspect": "Tell what a model or a run holds.",
    "verify": "Check a model's files, or compare it with PyTorch.",
    "data": "Build, check and describe training data.",
    "features": "Write what the frozen encoders see, to train from.",
    "train": "Train a branch: stage 1, stage 2, or your own.",
    "memory": "Tell what a chat or a run will need, before anything is loaded.",
    "eval": "Answer and score a benchmark.",
    "plot": "Draw a run's loss and learning rate.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Exit code 0; 1 with one line on stderr when it failed; 2 for wrong usage; 130 after Ctrl-C."""
    from vllama_jax.interrupts import ending_on_interrupt

    with ending_on_interrupt():
        _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> None:
    from vllama_jax.errors import VllamaError, os_error_line

    try:
        _run(arguments)
    except VllamaError as error:
        sys.exit(f"vllama: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone; nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # where no command knows better what to say: a folder that may not be entered, a full disk
        sys.exit(f"vllama: {os_error_line(error)}")


def _run(arguments: list[str]) -> None:
    import tyro

    name, *rest = arguments or ["--help"]
    if name in COMMANDS:
        module = importlib.import_module(f"vllama_jax.cli.{name}")
        command, rest = module.with_config(rest) if hasattr(module, "with_config") else (getattr(module, name), rest)
        tyro.cli(command, args=rest, prog=f"vllama {name}", config=(tyro.conf.FlagCreatePairsOff,))
        return
    print(_usage(), file=sys.stdout if name in ("-h", "--help") else sys.stderr)
    if name not in ("-h", "--help"):
        print(f"\nvllama: no command {name!r}{_suggestion(name)}", file=sys.stderr)
        sys.exit(2)


def _usage() -> str:
    lines = [f"  {name:10}{what}" for name, what in COMMANDS.items()]
    end = ["vllama COMMAND --help tells more.", "", 'Example: vllama chat clip.mp4 "What is happening?" --model MODEL']
    return "\n".join(["usage: vllama COMMAND …", "", *lines, "", *end])


def _suggestion(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
