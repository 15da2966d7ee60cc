"""The TPU compiler, for tests that start a process with it: libtpu, if PYTHONPATH or the environment has it.

It is not a requirement of the tests: JAX prints warnings in each process that finds libtpu on a machine without TPUs,
unless JAX_PLATFORMS is set.
"""

import importlib.util
import os

import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install --target FOLDER libtpu, and add FOLDER to PYTHONPATH",
)


def compiler_environment() -> dict[str, str]:
    """The environment of a process that compiles for TPUs on a machine without one."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
