"""Models on the Hugging Face Hub: model directories, and repositories with the original's PyTorch files.

A model directory (as `vllama push` uploads it) is read from huggingface_hub's cache. PyTorch files are converted once,
to converted/ORG--NAME/COMMIT in the cache folder. The conversion is `vllama convert` in a process of its own: it reads
with torch, whose memory is free again when it ends, and needs no accelerator.
"""

import importlib.util
import logging
import re
import subprocess
import sys
from pathlib import Path

from vllama_jax.errors import CheckpointError
from vllama_jax.io.atomic import ensure_directory, lock_directory
from vllama_jax.io.hub import (
    CONFIG_PATTERNS,
    WEIGHT_PATTERNS,
    download_snapshot,
    is_cached,
    list_files,
    parse_address,
    resolve_hub_path,
)
from vllama_jax.io.json_files import read_object
from vllama_jax.io.paths import cache_directory

MODEL_FILES = ["config.json", "manifest.json", "params/*", "tokenizer/*"]  # of a model directory
# The language model of these is LLaMA-2-chat, which its files do not show.
LLAMA_2_CHAT = re.compile(r"DAMO-NLP-SG/Video-LLaMA-2-(7B|13B)-(Pretrained|Finetuned)")
TORCH_SUFFIXES = (".pth", ".pt", ".ckpt")
_LANGUAGE_MODEL_FILE = re.compile(r"(.*/)?((pytorch_)?model(-\d+-of-\d+)?|consolidated\.\d+)\.(bin|safetensors|pth)")

logger = logging.getLogger(__name__)


def find_hub_model(address: str) -> Path:
    """Return the model directory for an address on the hub. Download, and convert if needed, what is not cached.

    Args:
        address: A repository, hf://org/name[@revision].

    Returns:
        The model directory. It belongs to one commit: a later commit of the repository has another directory.

    Raises:
        CheckpointError: The address is invalid, the repository cannot be downloaded, or it contains no model that can
            be used.
    """
    repository, revision, file = parse_address(address)
    if file:
        raise CheckpointError(f"{address}: a file; a model is a whole repository, hf://{repository}")
    snapshot = download_snapshot(repository, revision, CONFIG_PATTERNS)
    if (snapshot / "manifest.json").is_file():
        if missing := not is_cached(repository, snapshot.name, MODEL_FILES):
            logger.warning(f"{address}: downloading the model to {snapshot}")
        return download_snapshot(repository, snapshot.name, MODEL_FILES, show_progress=missing)
    return _convert_once(address, repository, snapshot)


def _convert_once(address: str, repository: str, snapshot: Path) -> Path:
    """Return the converted model of a repository at the commit of a snapshot. Other processes wait for the first."""
    out = cache_directory() / "converted" / repository.replace("/", "--") / snapshot.name
    if out.is_dir():
        return out
    _check_convertible(address, list_files(repository, snapshot))
    try:
        ensure_directory(out.parent)
        with lock_directory(out.parent, busy_message=None):
            if not out.is_dir():
                logger.warning(f"{address}: downloading and converting it to {out}; this is done once")
                files = resolve_hub_path(f"hf://{repository}@{snapshot.name}")
                _convert(address, files, LLAMA_2_CHAT.fullmatch(repository) is not None, out)
    except OSError as error:
        raise CheckpointError(
            f"{address}: cannot be converted to {out} ({error.strerror}); set VLLAMA_CACHE to another folder"
        ) from error
    return out


def _check_convertible(address: str, files: list[str]) -> None:
    """Raise CheckpointError if the names of a repository's files show that it cannot be converted."""
    suffixes = tuple(pattern.removeprefix("*") for pattern in WEIGHT_PATTERNS)
    weights = [file for file in files if file.endswith(suffixes)]
    if not weights:
        raise CheckpointError(f"{address}: no model in this repository (no manifest.json, and no weight files)")
    if all(_LANGUAGE_MODEL_FILE.fullmatch(file) for file in weights):
        raise CheckpointError(
            f"{address}: weights of a language model at most, without vision and audio branches; "
            f"pass it to `vllama convert --llama {address}` with the other components (docs/weights.md)"
        )
    if any(file.endswith(TORCH_SUFFIXES) for file in weights) and importlib.util.find_spec("torch") is None:
        raise CheckpointError(
            f"{address}: converting its PyTorch files needs torch, which is not installed: "
            "pip install 'vllama-jax[convert]'"
        )


def _convert(address: str, files: Path, has_llama_2_chat: bool, out: Path) -> None:
    """Run `vllama convert` in another process. Raise CheckpointError with its message if it fails."""
    options = ["--published-encoders"]
    if has_llama_2_chat:
        options += ["--template", "llama_2"]
    if _is_exported_config(files / "config.json"):
        options += ["--config", str(files / "config.json")]
    command = [sys.executable, "-m", "vllama_jax", "convert", str(files), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckpointError(f"{address}: cannot be converted: {lines[-1].removeprefix('vllama: ')}")


def _is_exported_config(path: Path) -> bool:
    """Return whether a config.json is that of `vllama export`, which has the head counts that no tensor shows."""
    return path.is_file() and isinstance(read_object(path).get("llama"), dict)
