"""The miniature that comes with the package: a small trained model, and clips to ask it about (docs/miniature.md).

Its model directory is one file, `assets/model.zip`, which is unpacked into the cache folder when it is first used.
`assets/model.json` has the digests of that file and of the weights in it.
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

MODEL_NAME, CLIP_NAME = "miniature", "demo"  # what stands for them where a path is asked for
ASSETS = Path(__file__).parents[1] / "miniature" / "assets"
CLIPS, RESULTS = ASSETS / "clips", ASSETS / "results.json"
MODEL_DESCRIPTION = (
    "the miniature answers: 3 million weights that know 16 things (a bell, a dog, …) in 8 colors, how they move and "
    "how they sound, and nothing else (docs/miniature.md); --model takes a real model"
)
DEMO_CLIP = "bell.mp4"
CLIP_DESCRIPTION = "a rendered clip of 4 seconds: a large yellow bell moves to the left and rings"
CHAT_HINT = (
    'Ask a question, such as "Describe it.", "Which way does it go?" or "What do you hear?"; an empty line or Ctrl-D '
    "ends the chat."
)

logger = logging.getLogger(__name__)


def shipped_model() -> Path:
    """Return the directory of the model that comes with the package, which is unpacked unless it is there intact.

    It is in the cache folder. Where that cannot be written, a warning is logged, and the directory is a temporary one
    that ends with the process.

    Raises:
        CheckpointError: The package is installed without it, its file is corrupt, or it can be unpacked nowhere.
    """
    archive, digest = ASSETS / "model.zip", _digests().get("archive_xxh3_128")
    if digest is None:
        raise CheckpointError(f"{ASSETS}: the miniature is not installed; name a model with --model")
    try:
        directory = cache_directory() / MODEL_NAME / digest  # packages that bring other weights have other directories
        unpack(archive, digest, directory)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        return _unpack_temporarily(archive, digest, getattr(error, "strerror", None) or str(error))
    return directory


def is_shipped_digest(digest: str) -> bool:
    """Return whether the weights of the model that comes with the package have this `ModelDirectory.digest`."""
    return digest == _digests().get("model_digest")


def is_shipped(path: str | Path) -> bool:
    """Return whether a path is the model that comes with the package: "miniature", or where a cache folder has it.

    A model or run directory of the user's that is called "miniature" wins.
    """
    path = as_path(path)
    if str(path) == MODEL_NAME:
        return not (path / "config.json").is_file()
    return path.parent.name == MODEL_NAME and path.name == _digests().get("archive_xxh3_128")


def find_model(path: str | Path) -> Path:
    """Return the directory that a user names: "miniature" is ours, unless a model or run directory has that name."""
    return shipped_model() if is_shipped(path) else as_path(path)


def find_clip(path: str | Path) -> Path:
    """Return the file that a user names: "demo" is a clip of ours, unless a file has that name."""
    path = as_path(path)
    return CLIPS / DEMO_CLIP if str(path) == CLIP_NAME and not path.is_file() else path


def _digests() -> dict[str, Any]:
    """What model.json has; nothing where the package is installed without the miniature."""
    file = ASSETS / "model.json"
    return read_object(file) if file.is_file() else {}


@functools.cache
def _unpack_temporarily(archive: Path, digest: str, why: str) -> Path:
    """Unpack into a temporary directory that is removed when the process ends."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="vllama-miniature-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        unpack(archive, digest, folder / MODEL_NAME)
    except OSError as error:
        raise CheckpointError(
            f"the miniature can be unpacked neither in the cache folder ({why}) nor in {tempfile.gettempdir()} "
            f"({error.strerror}); point VLLAMA_CACHE at a folder that can be written"
        ) from error
    logger.warning(f"the miniature is unpacked into {folder} for this process only: its cache folder: {why}")
    return folder / MODEL_NAME
