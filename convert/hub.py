"""Download repositories of the Hugging Face hub, hf://org/name, into huggingface_hub's cache."""

import re
from pathlib import Path
from typing import Any

from vllama_jax.errors import CheckpointError
from vllama_jax.io.paths import as_path
from vllama_jax.runtime.extras import import_extra

# hf://org/name, hf://org/name@revision, hf://org/name/folder/file.pth; pathlib removes one of the two slashes
ADDRESS = re.compile(r"hf:/{1,2}(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")
CONFIG_PATTERNS = ["*.json", "*.model"]
WEIGHT_PATTERNS = ["*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt"]
IGNORED_PATTERNS = ["original/*"]  # Meta's layout, next to Hugging Face's


def resolve_hub_path(path: str | Path) -> Path:
    """Resolve an hf:// address to a path in the cache, and download what is not there. Other paths are returned as is.

    Only weights, configs and tokenizers are downloaded, and no .bin files if there are safetensors.

    Args:
        path: A path, or an address of a repository, hf://org/name[@revision], or of one file,
            hf://org/name[@revision]/file.

    Returns:
        The path of the repository's directory, or of the file.

    Raises:
        CheckpointError: The address is invalid, the files are not cached and cannot be downloaded, or huggingface_hub
            is not installed.
    """
    if not str(path).startswith("hf:/"):
        return as_path(path)
    address = ADDRESS.fullmatch(str(path))
    if address is None:
        raise CheckpointError(f"{path}: not an address on the hub; write hf://org/name or hf://org/name/file")
    repository, revision, file = address["repository"], address["revision"], address["file"]
    if file:
        found = _download_snapshot(repository, revision, [file]) / file
        if not found.exists():
            raise CheckpointError(f"hf://{repository}: file {file} not found")
        return found
    snapshot = _download_snapshot(repository, revision, CONFIG_PATTERNS)
    indices = [index.relative_to(snapshot).parent for index in snapshot.rglob("model.safetensors.index.json")]
    return _download_snapshot(
        repository,
        revision,
        CONFIG_PATTERNS + WEIGHT_PATTERNS,
        [str(folder / "pytorch_model*.bin") for folder in indices],
    )


def _download_snapshot(
    repository: str, revision: str | None, patterns: list[str], ignored: list[str] | None = None
) -> Path:
    instead = "download it yourself and give the directory"
    hub = import_extra(
        "huggingface_hub", "convert", f"hf://{repository}: reading from the hub", CheckpointError, instead
    )
    ignored = [*IGNORED_PATTERNS, *(ignored or [])]
    try:
        return Path(
            hub.snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
        )
    except Exception as error:  # the hub, the network and the cache raise many types
        raise CheckpointError(f"hf://{repository}: {_explain_error(error, hub.errors)}") from error


def _explain_error(error: Exception, errors: Any) -> str:
    if isinstance(error, errors.GatedRepoError):
        return "gated repository; accept its license on its page, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "repository not found, or private; check its name, or run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "revision not found"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "not completely cached, and the hub cannot be reached; go online and unset HF_HUB_OFFLINE"
    return f"cannot be downloaded ({' '.join(str(error).split())[:150] or type(error).__name__})"
