"""The command `vllama env`."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator

from vllama_jax.errors import VllamaError, format_error
from vllama_jax.io.paths import cache_directory

PACKAGES = (
    "vllama-jax",
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "av",
    "transformers",
    "huggingface-hub",
    "torch",
    "libtpu",
)
PREFIXES = ("JAX_", "XLA_", "VLLAMA_CACHE", "HF_HUB_OFFLINE", "HF_HOME", "CUDA_VISIBLE_DEVICES", "LIBTPU_INIT_ARGS")


def env() -> None:
    """Print the versions, the devices and the settings that a bug report needs.

    Example: vllama env

    It prints no tokens and no keys: of the environment, only variables of JAX, XLA and the caches.
    """
    for name, value in _describe():
        print(f"{name}: {value}")


def _describe() -> Iterator[tuple[str, str]]:
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", f"{platform.platform()}, {os.cpu_count()} CPUs"
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "devices", _describe_devices()
    try:
        yield "cache folder", str(cache_directory())
    except (VllamaError, RuntimeError) as error:  # RuntimeError: there is no home directory
        yield "cache folder", format_error(error)
    for name in sorted(os.environ):
        if name.startswith(PREFIXES):
            yield name, os.environ[name]


def _describe_devices() -> str:
    try:
        import jax

        kinds = [device.device_kind for device in jax.local_devices()]
        counts = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
        return f"{counts} ({jax.default_backend()}, {jax.process_count()} process)"
    except Exception as error:  # backends that cannot be initialized raise many types, and this is the report of it
        return f"none usable ({format_error(error)})"
