"""Repositories of the Hugging Face hub, named hf://org/name: downloaded once, and then read from its cache."""

import re
from pathlib import Path
from typing import Any

from vllama_jax.errors import CheckpointError
from vllama_jax.io.paths import as_path
from vllama_jax.runtime.extras import import_extra

# hf://org/name, hf://org/name@revision, hf://org/name/folder/file.pth; pathlib makes one slash of two
ADDRESS = re.compile(r"hf:/{1,2}(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")
CONFIG_PATTERNS = ["*.json", "*.model"]
WEIGHT_PATTERNS = ["*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt"]
IGNORED_PATTERNS = ["original/*"]  # Meta's layout beside Hugging Face's


def resolve_hub_path(path: str | Path) -> Path:
    """Where a path's files are: itself; of an hf:// address the cached repository, or the one file that it names.

    Only weights, configs and tokenizers are downloaded; of a model in both formats, safetensors.
    Raises CheckpointError when it is not cached and cannot be downloaded, or huggingface_hub is not installed.
    """
    if not str(path).startswith("hf:/"):
        return as_path(path)
    address = ADDRESS.fullmatch(str(path))
    if address is None:
        raise CheckpointError(f"{path}: not an address on the hub; name it as hf://org/name or hf://org/name/file")
    repository, revision, file = address["repository"], address["revision"], address["file"]
    if file:
        found = _download_snapshot(repository, revision, [file]) / file
        if not found.exists():
            raise CheckpointError(f"hf://{repository}: has no file {file}")
        return found
    home = _download_snapshot(repository, revision, CONFIG_PATTERNS)
    indices = [index.relative_to(home).parent for index in home.rglob("model.safetensors.index.json")]
    return _download_snapshot(
        repository,
        revision,
        CONFIG_PATTERNS + WEIGHT_PATTERNS,
        [str(folder / "pytorch_model*.bin") for folder in indices],
    )


def _download_snapshot(
    repository: str, revision: str | None, patterns: list[str], without: list[str] | None = None
) -> Path:
    instead = "download it yourself and name the directory"
    hub = import_extra(
        "huggingface_hub", "convert", f"hf://{repository}: reading from the hub", CheckpointError, instead
    )
    ignored = [*IGNORED_PATTERNS, *(without or [])]
    try:
        return Path(
            hub.snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
        )
    except Exception as error:  # the hub, the network and the cache fail in many ways
        raise CheckpointError(f"hf://{repository}: {_explain_error(error, hub.errors)}") from error


def _explain_error(error: Exception, errors: Any) -> str:
    if isinstance(error, errors.GatedRepoError):
        return "its owner asks to accept a licence first; do that on its page, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one; check its name, or `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "not (all) in the cache, and the hub cannot be reached; go online once (HF_HUB_OFFLINE unset)"
    return f"cannot be downloaded ({' '.join(str(error).split())[:150] or type(error).__name__})"
