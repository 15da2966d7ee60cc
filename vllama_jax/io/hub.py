"""Download repositories of the Hugging Face Hub, hf://org/name, into huggingface_hub's cache."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from vllama_jax.errors import CheckpointError
from vllama_jax.io.paths import as_path

# hf://org/name, hf://org/name@revision, hf://org/name/folder/file.pth; pathlib removes one of the two slashes
ADDRESS = re.compile(r"hf:/{1,2}(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")
CONFIG_PATTERNS = ["*.json", "*.model"]
WEIGHT_PATTERNS = ["*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt"]
IGNORED_PATTERNS = ["original/*"]  # Meta's layout, next to Hugging Face's


class HubAddress(NamedTuple):
    """An address on the hub.

    Attributes:
        repository: The owner and the name, "org/name".
        revision: A branch, a tag or a commit hash; None for the default branch.
        file: The path of a file in the repository; None for the whole repository.
    """

    repository: str
    revision: str | None
    file: str | None


def is_hub_address(path: Any) -> bool:
    """Return whether a path or a string is an address on the hub."""
    return str(path).startswith("hf:/")


def parse_address(address: str) -> HubAddress:
    """Split an address on the hub. Raise CheckpointError if it is invalid."""
    found = ADDRESS.fullmatch(address)
    if found is None:
        raise CheckpointError(f"{address}: not an address on the hub; write hf://org/name or hf://org/name/file")
    return HubAddress(found["repository"], found["revision"], found["file"])


def resolve_hub_path(path: str | Path) -> Path:
    """Resolve an hf:// address to a path in the cache, and download what is not there. Other paths are returned as is.

    Only weights, configs and tokenizers are downloaded, and no .bin files if there are safetensors.

    Args:
        path: A path, or an address of a repository, hf://org/name[@revision], or of one file,
            hf://org/name[@revision]/file.

    Returns:
        The path of the repository's directory, or of the file.

    Raises:
        CheckpointError: The address is invalid, or the files are not cached and cannot be downloaded.
    """
    if not is_hub_address(path):
        return as_path(path)
    repository, revision, file = parse_address(str(path))
    if file:
        found = download_snapshot(repository, revision, [file]) / file
        if not found.exists():
            raise CheckpointError(f"hf://{repository}: file {file} not found")
        return found
    snapshot = download_snapshot(repository, revision, CONFIG_PATTERNS)
    indices = [index.relative_to(snapshot).parent for index in snapshot.rglob("model.safetensors.index.json")]
    return download_snapshot(
        repository,
        revision,
        CONFIG_PATTERNS + WEIGHT_PATTERNS,
        [str(folder / "pytorch_model*.bin") for folder in indices],
        show_progress=True,
    )


def download_snapshot(
    repository: str,
    revision: str | None,
    patterns: Sequence[str],
    ignored: Sequence[str] = (),
    *,
    show_progress: bool = False,
) -> Path:
    """Download files of a repository into huggingface_hub's cache, unless they are there.

    Args:
        repository: "org/name".
        revision: A branch, a tag or a commit hash; None for the default branch.
        patterns: Which files, as patterns of `fnmatch`, whose `*` also matches "/".
        ignored: Patterns of files that are not downloaded.
        show_progress: Show progress bars if stderr is a terminal.

    Returns:
        The directory of the files. Its name is the commit hash of the revision.

    Raises:
        CheckpointError: The files are not cached and cannot be downloaded.
    """
    hub = import_hub()
    ignored = [*IGNORED_PATTERNS, *ignored]
    try:
        with hub_output(hub, show_progress):
            return Path(
                hub.snapshot_download(
                    repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=ignored
                )
            )
    except Exception as error:  # the hub, the network and the cache raise many types
        raise CheckpointError(f"hf://{repository}: {explain_hub_error(error)}") from error


def is_cached(repository: str, commit: str, patterns: Sequence[str]) -> bool:
    """Return whether `download_snapshot` has downloaded these files of a commit."""
    hub = import_hub()
    try:
        hub.snapshot_download(repository, revision=commit, allow_patterns=list(patterns), local_files_only=True)
    except hub.errors.LocalEntryNotFoundError:  # also IncompleteSnapshotError
        return False
    return True


@contextlib.contextmanager
def hub_output(hub: ModuleType, show_progress: bool) -> Iterator[None]:
    """Silence warnings of huggingface_hub, and its progress bars unless `show_progress` is set on a terminal."""
    log, hides_bars = hub.utils.logging, hub.utils.are_progress_bars_disabled()
    verbosity = log.get_verbosity()
    log.set_verbosity_error()
    if not (show_progress and sys.stderr.isatty()):
        hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if not hides_bars:
            hub.utils.enable_progress_bars()


def list_files(repository: str, snapshot: Path) -> list[str]:
    """List the files of a repository at the commit of a snapshot; if the hub cannot be reached, those of the snapshot.

    Args:
        repository: "org/name".
        snapshot: A directory that `download_snapshot` returned.
    """
    hub = import_hub()
    try:
        return hub.HfApi().list_repo_files(repository, revision=snapshot.name)
    except Exception:  # no network, or the server fails: what is cached may be complete
        return [
            Path(folder, name).relative_to(snapshot).as_posix()
            for folder, _, names in os.walk(snapshot)
            for name in names
        ]


def import_hub() -> ModuleType:
    """Import huggingface_hub, with its errors and utils. Commands that do not use it start faster without it."""
    import huggingface_hub
    import huggingface_hub.errors
    import huggingface_hub.utils

    return huggingface_hub


def explain_hub_error(error: Exception, done: str = "downloaded") -> str:
    """Explain an error of huggingface_hub in a part of a line: what is wrong, and what to do.

    Args:
        error: The error.
        done: What was to be done, "downloaded" or "uploaded".
    """
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "gated repository; accept its license on its page, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "repository not found, or private; check its name, or run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "revision not found"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        missing = "not completely cached, and " if done == "downloaded" else ""
        return f"{missing}the hub cannot be reached; go online and unset HF_HUB_OFFLINE"
    if isinstance(error, errors.HfHubHTTPError) and status in (401, 403):
        return "access denied; run `hf auth login` with a token that has the rights for it"
    return f"cannot be {done} ({' '.join(str(error).split())[:150] or type(error).__name__})"
