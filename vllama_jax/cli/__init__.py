"""The `vllama` command line. Each command is a module; the parameters of its function are the command's options.

No heavy package is imported before a command runs, so `--help` answers in under a second.
"""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "chat": "Ask questions about a video, an image or an audio file.",
    "generate": "Answer a file of questions about videos, images and audio.",
    "serve": "Serve a model with the API of OpenAI.",
    "convert": "Create a model directory from PyTorch weights.",
    "export": "Write a model or a run as PyTorch weights.",
    "quantize": "Quantize the weights of a model or a run to int8 or int4.",
    "push": "Upload a model to the Hugging Face Hub.",
    "inspect": "List the components of a model or a run.",
    "verify": "Check a model's files, or compare the model with PyTorch.",
    "embed": "Write features of video, image and audio files.",
    "data": "Build, check and describe training data.",
    "features": "Precompute the features of the frozen encoders.",
    "train": "Train a branch as a run config defines it.",
    "memory": "Estimate the memory of a chat or a run without loading weights.",
    "compile": "Compile for TPUs ahead of time: memory, time, bottleneck.",
    "eval": "Answer the questions of a benchmark and score the answers.",
    "plot": "Plot the loss and the learning rate of runs.",
    "env": "Print versions and devices, for a bug report.",
}
EXAMPLE = 'vllama chat clip.mp4 "What is happening?" --model MODEL'


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit the process if it fails.

    Args:
        arguments: The command line without the program name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: With code 1 for an error, 2 for wrong usage (both print one line on stderr), 130 after Ctrl-C, or 0
            after `--help`.
    """
    from vllama_jax.runtime.interrupts import exit_on_interrupt

    with exit_on_interrupt(until_exit=arguments is None):
        _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> None:
    from vllama_jax.cli._logs import configure_logging
    from vllama_jax.cli._usage import UsageError
    from vllama_jax.errors import exit_on_error

    with exit_on_error():
        try:
            with configure_logging():
                _run(arguments)
        except UsageError as error:
            print(f"vllama: {error}", file=sys.stderr)
            sys.exit(2)


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
        raise _usage.UsageError(f"{name!r} is not a command{_suggest_command(name)}")


def _suggest_command(name: str) -> str:
    from vllama_jax.errors import suggest_name

    return f"; {suggest_name(name, COMMANDS) or 'choose one of ' + ', '.join(COMMANDS)}"
