"""Files of scenes never trained on, and what the frozen encoders make of them: what a miniature is asked about."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vllama_jax.chat import Prepared, prepare
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.miniature import render
from vllama_jax.miniature.pictures import in_processes
from vllama_jax.miniature.scene import WAYS, Motion, Scene, draw_scene, heard_otherwise
from vllama_jax.miniature.world import draw_for, write_clip, write_sound, write_still
from vllama_jax.model import Model
from vllama_jax.text.prompts import Media

BATCH = 50  # files at a time


@dataclasses.dataclass(frozen=True)
class FileSet:
    """Scenes of one sort.

    Attributes:
        name: Its files are drawn by this name, the seed and a number.
        motions: Taken in turn.
        sound: Whether they have sound. Things at rest without sound are stills.
        seen: Whether they have pictures. Sound without pictures is a WAV.
        fits: The part of scenes that are heard as they look.
        snr_db: How far white noise is below the sound.
        seconds: How long clips and sounds are.
    """

    name: str
    motions: tuple[Motion, ...]
    sound: bool = False
    seen: bool = True
    fits: float = 1.0
    snr_db: float = 15.0
    seconds: float = render.SECONDS


MOVING = FileSet("ways", WAYS)
STILLS = FileSet("stills", ("rests",))
TURNS = FileSet("turns", ("in turn",))
SOUNDS = FileSet("sounds", ("rests",), sound=True, seen=False)
TWO_SHORT = FileSet("two", ("in turn",), sound=True, seen=False)  # most pieces are of both sounds
TWO_SOUNDS = dataclasses.replace(TWO_SHORT, seconds=2 * render.SECONDS)
BOTH = FileSet("both", WAYS, sound=True, fits=0.5)


@dataclasses.dataclass(frozen=True)
class Shown:
    """Files as the frozen encoders leave them: features [n, t, q, d] of frames, vectors [n, s, e] of sounds."""

    scenes: list[Scene]
    media: list[Media]
    features: np.ndarray | None
    sounds: np.ndarray | None

    def require_features(self) -> np.ndarray:
        """The features of frames, for files of a set with pictures."""
        assert self.features is not None
        return self.features

    def require_sounds(self) -> np.ndarray:
        """The vectors of sounds, for files of a set with sound."""
        assert self.sounds is not None
        return self.sounds

    def some(self, rows: Sequence[int]) -> "Shown":
        """Those files only."""
        rows = list(rows)
        features, sounds = (part if part is None else part[rows] for part in (self.features, self.sounds))
        return Shown([self.scenes[row] for row in rows], [self.media[row] for row in rows], features, sounds)

    def batches(self) -> list["Shown"]:
        """BATCH files at a time."""
        count = len(self.scenes)
        return [self.some(range(first, min(first + BATCH, count))) for first in range(0, count, BATCH)]


def show(model: Model, files: FileSet, seed: int, count: int, say: Callable[[str], None]) -> Shown:
    """Writes `count` files of a set, reads them as a chat does, and runs the model's frozen encoders on them."""
    say(f"{files.name}: {count} files")
    with tempfile.TemporaryDirectory() as folder:
        parts = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
        work = [(Path(folder), files, seed, numbers, model.config) for numbers in parts]
        read = [one for part in in_processes(_write_and_read, work) for one in part]
    scenes, prepared = [one[0] for one in read], [one[1] for one in read]
    features = _encoded(model, "video", [one.frames for one in prepared]) if files.seen else None
    sounds = _encoded(model, "audio", [one.mel for one in prepared]) if files.sound else None
    return Shown(scenes, [one.prompt_media for one in prepared], features, sounds)


def _write_and_read(work: tuple[Path, FileSet, int, range, VideoLlamaConfig]) -> list[tuple[Scene, Prepared]]:
    folder, files, seed, numbers, config = work
    found = []
    for number in numbers:
        draw = draw_for(seed, files.name, number)
        scene = heard_otherwise(draw_scene(draw, files.motions[number % len(files.motions)], "test"), draw, files.fits)
        path = _write(folder / str(number), files, scene, draw)
        found.append((scene, prepare(path, config, require_audio=files.sound)))
        path.unlink()
    return found


def _write(stem: Path, files: FileSet, scene: Scene, draw: np.random.Generator) -> Path:
    """The scene as a file of its set's sort."""
    if not files.seen:
        path = stem.with_suffix(".wav")
        write_sound(path, scene, draw, seconds=files.seconds, snr_db=files.snr_db)
    elif files.motions == ("rests",) and not files.sound:
        path = stem.with_suffix(".jpg")
        write_still(path, scene, draw)
    else:
        path = stem.with_suffix(".mp4")
        write_clip(path, scene, draw, seconds=files.seconds, snr_db=files.snr_db, sound=files.sound)
    return path


@functools.cache
def _encoder(sense: str) -> Any:
    if sense == "audio":
        return jax.jit(lambda network, mel: network.embed_sounds(mel))
    return jax.jit(lambda network, frames: network.encode_frames(frames))


def _encoded(model: Model, sense: str, given: list[np.ndarray]) -> np.ndarray:
    encode = _encoder(sense)
    groups = [np.stack(given[first : first + BATCH]) for first in range(0, len(given), BATCH)]
    return np.concatenate([np.asarray(encode(model.network, group)) for group in groups])
