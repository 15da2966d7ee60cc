"""The miniature that comes with the package: a small trained model, and clips to ask it about (docs/miniature.md)."""

import importlib.util
from pathlib import Path

from vllama_jax.errors import CheckpointError

MODEL_NAME, CLIP_NAME = "miniature", "demo"  # what stands for them where a path is asked for
BOX = Path(importlib.util.find_spec("vllama_jax.miniature").origin).parent / "box"
MODEL, CLIPS, RESULTS = BOX / "model", BOX / "clips", BOX / "results.json"
ABOUT_MODEL = (
    "the miniature answers: 3 million weights that know 16 things (a bell, a dog, …) in 8 colors, how they move and "
    "how they sound, and nothing else (docs/miniature.md); --model takes a real model"
)
DEMO_CLIP = "bell.mp4"
ABOUT_CLIP = "a rendered clip of 4 seconds: a large yellow bell moves to the left and rings"
TRY = (
    'Ask a question, such as "Describe it.", "Which way does it go?" or "What do you hear?"; an empty line or Ctrl-D '
    "ends the chat."
)


def shipped_model() -> Path:
    """Return the directory of the model that comes with the package. Raises CheckpointError where it is not there."""
    if not MODEL.is_dir():
        raise CheckpointError(f"{MODEL}: the miniature is not installed; name a model with --model")
    return MODEL


def find_model(path: str | Path) -> Path:
    """Return the directory that a user names: "miniature" is ours, unless a model or run directory has that name."""
    path = Path(path)
    return shipped_model() if str(path) == MODEL_NAME and not (path / "config.json").is_file() else path


def find_clip(path: str | Path) -> Path:
    """Return the file that a user names: "demo" is a clip of ours, unless a file has that name."""
    path = Path(path)
    return CLIPS / DEMO_CLIP if str(path) == CLIP_NAME and not path.is_file() else path
