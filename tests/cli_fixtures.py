"""Run commands in this process or in a separate one, and check their one-line errors."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllama_jax import cli

VLLAMA = str(Path(sys.executable).with_name("vllama"))


def run_vllama(*arguments: object, cache: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess:
    """Run the installed `vllama` in a separate process, with the session's compilation cache or the given one."""
    command = [VLLAMA, *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"} | ({"VLLAMA_CACHE": str(cache)} if cache else {})
    return subprocess.run(command, capture_output=True, text=True, input=stdin, env=environment, check=False)


def expect_error_line(*arguments: object) -> str:
    """Return the line that a command prints after "vllama: " when it exits with 1."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    message = stop.value.code
    assert isinstance(message, str), "the exit code is not 1"
    assert message.startswith("vllama: ")
    assert "\n" not in message
    return message.removeprefix("vllama: ")


def expect_error(capsys, *arguments: object) -> str:
    """Return the same line with "vllama: " of a command that has printed nothing else."""
    message = expect_error_line(*arguments)
    assert capsys.readouterr().out == ""
    return f"vllama: {message}"


def expect_usage_error(*arguments: object) -> str:
    """Return the one line that a command prints on stderr when it exits with 2."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        cli.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    assert out.getvalue() == ""
    assert errors.getvalue().startswith("vllama: ")
    assert errors.getvalue().count("\n") == 1
    return errors.getvalue().strip().removeprefix("vllama: ")
