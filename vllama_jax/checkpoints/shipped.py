"""The miniature that is part of the package: a small trained model, and clips to ask it about (docs/miniature.md).

Its model directory is stored as `assets/model.zip`, which is unpacked into the cache folder on first use.
`assets/model.json` has the digests of this file and of the weights in it.
"""

import atexit
import functools
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from vllama_jax.errors import CheckpointError
from vllama_jax.io.archives import unpack
from vllama_jax.io.json_files import read_object
from vllama_jax.io.paths import as_path, cache_directory

MODEL_NAME, CLIP_NAME = "miniature", "demo"  # accepted in place of their paths
ASSETS = Path(__file__).parents[1] / "miniature" / "assets"
CLIPS, RESULTS = ASSETS / "clips", ASSETS / "results.json"
MODEL_DESCRIPTION = (
    "answers are from the miniature, a model of 3 million parameters that knows only 16 objects (a bell, a dog, …) in "
    "8 colors, their motions and their sounds (docs/miniature.md); choose another model with --model"
)
DEMO_CLIP = "bell.mp4"
CLIP_DESCRIPTION = "a rendered clip of 4 seconds: a large yellow bell moves to the left and rings"
CHAT_HINT = (
    'Ask a question, such as "Describe it.", "Which way does it go?" or "What do you hear?"; /help lists the commands.'
)

logger = logging.getLogger(__name__)


def shipped_model() -> Path:
    """Return the model directory of the miniature, and unpack it if it is not there or not intact.

    The directory is in the cache folder. If that cannot be written, a warning is logged, and the directory is a
    temporary one, which is removed at the end of the process.

    Raises:
        CheckpointError: The package is installed without the miniature, its file is corrupt, or no folder can be
            written.
    """
    archive, digest = ASSETS / "model.zip", _read_digests().get("archive_xxh3_128")
    if digest is None:
        raise CheckpointError(f"{ASSETS}: the miniature is not installed; set a model with --model")
    try:
        directory = cache_directory() / MODEL_NAME / digest  # other versions of the package may have other weights
        unpack(archive, digest, directory)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        return _unpack_temporarily(archive, digest, getattr(error, "strerror", None) or str(error))
    return directory


def is_shipped_digest(digest: str) -> bool:
    """Return whether the weights of the miniature have this digest (`ModelDirectory.digest`)."""
    return digest == _read_digests().get("model_digest")


def is_shipped(path: str | Path) -> bool:
    """Return whether a path is that of the miniature: "miniature", or its directory in a cache folder.

    A model or run directory with the name "miniature" takes precedence.
    """
    path = as_path(path)
    if str(path) == MODEL_NAME:
        return not (path / "config.json").is_file()
    return path.parent.name == MODEL_NAME and path.name == _read_digests().get("archive_xxh3_128")


def find_clip(path: str | Path) -> Path:
    """Return the file for a local path. "demo" is a clip of the package, unless there is a file of that name."""
    path = Path(path)
    return CLIPS / DEMO_CLIP if str(path) == CLIP_NAME and not path.is_file() else path


def _read_digests() -> dict[str, Any]:
    """Return the content of model.json; empty if the package is installed without the miniature."""
    file = ASSETS / "model.json"
    return read_object(file) if file.is_file() else {}


@functools.cache
def _unpack_temporarily(archive: Path, digest: str, reason: str) -> Path:
    """Unpack into a temporary directory, which is removed at the end of the process."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="vllama-miniature-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        unpack(archive, digest, folder / MODEL_NAME)
    except OSError as error:
        raise CheckpointError(
            f"the miniature can be unpacked neither in the cache folder ({reason}) nor in {tempfile.gettempdir()} "
            f"({error.strerror}); set VLLAMA_CACHE to a writable folder"
        ) from error
    logger.warning(f"the miniature is unpacked to {folder} for this process, as the cache folder failed: {reason}")
    return folder / MODEL_NAME
