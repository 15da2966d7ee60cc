"""`python -OO` drops docstrings, from which some commands take their help."""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval", "train vision_stage1", "features vision_stage1"])
def test_help_without_docstrings_lists_the_options(command):
    started = [sys.executable, "-OO", "-m", "vllama_jax", *command.split(), "--help"]
    found = subprocess.run(started, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "--base" in found.stdout
