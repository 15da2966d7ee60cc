"""Download the frozen encoders from where LAVIS publishes them, as the original does."""

import shutil
import urllib.error
import urllib.request
from pathlib import Path

from vllama_jax.errors import CheckpointError
from vllama_jax.io.atomic import ensure_directory, lock_directory
from vllama_jax.io.paths import cache_directory

_IDLE_SECONDS = 60.0  # without a byte from the server


def download_published(url: str) -> Path:
    """Download a file to downloads/NAME in the cache folder, unless it is there.

    It appears when it is complete. Processes that need it at the same time wait for the first one.

    Args:
        url: The URL of the file.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: It cannot be downloaded or written.
    """
    path = cache_directory() / "downloads" / url.rpartition("/")[2]
    if path.is_file():
        return path
    partial = path.with_name(f".{path.name}.partial")
    try:
        ensure_directory(path.parent)
        with lock_directory(path.parent, busy_message=None):
            if not path.is_file():
                _download(url, partial)
                partial.rename(path)
    except (OSError, urllib.error.URLError) as error:
        partial.unlink(missing_ok=True)
        why = " ".join(str(getattr(error, "reason", None) or error.strerror or error).split())[:150]
        raise CheckpointError(f"{url}: cannot be downloaded ({why}); download it yourself to {path}") from error
    return path


def _download(url: str, out: Path) -> None:
    """Write the content of a URL to a file. Raise OSError if the connection ends before it is complete."""
    with urllib.request.urlopen(url, timeout=_IDLE_SECONDS) as response, out.open("wb") as file:
        shutil.copyfileobj(response, file, 2**20)
    expected = response.headers.get("Content-Length")
    if expected is not None and out.stat().st_size != int(expected):
        raise OSError(f"{out.stat().st_size:,} of {int(expected):,} bytes arrived")
