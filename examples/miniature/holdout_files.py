"""Files of scenes never trained on, and what the frozen encoders make of them: what a miniature is asked about."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vllama_jax.chat import PreparedMedia, prepare_media
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.miniature import render
from vllama_jax.miniature.images import map_in_processes
from vllama_jax.miniature.scene import DIRECTIONS, Motion, Scene, draw_scene, randomize_sound
from vllama_jax.miniature.world import make_generator, write_clip, write_image, write_wav
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
    has_audio: bool = False
    has_frames: bool = True
    match_probability: float = 1.0
    snr_db: float = 15.0
    seconds: float = render.SECONDS


MOVING = FileSet("ways", DIRECTIONS)
STILLS = FileSet("stills", ("rests",))
TURNS = FileSet("turns", ("in turn",))
SOUNDS = FileSet("sounds", ("rests",), has_audio=True, has_frames=False)
TWO_SHORT = FileSet("two", ("in turn",), has_audio=True, has_frames=False)  # most pieces are of both sounds
TWO_SOUNDS = dataclasses.replace(TWO_SHORT, seconds=2 * render.SECONDS)
BOTH = FileSet("both", DIRECTIONS, has_audio=True, match_probability=0.5)


@dataclasses.dataclass(frozen=True)
class EncodedFiles:
    """Files as the frozen encoders leave them: features [n, t, q, d] of frames, vectors [n, s, e] of sounds."""

    scenes: list[Scene]
    media: list[Media]
    features: np.ndarray | None
    audio_vectors: np.ndarray | None

    def require_features(self) -> np.ndarray:
        """The features of frames, for files of a set with pictures."""
        assert self.features is not None
        return self.features

    def require_audio_vectors(self) -> np.ndarray:
        """The vectors of sounds, for files of a set with sound."""
        assert self.audio_vectors is not None
        return self.audio_vectors

    def select(self, rows: Sequence[int]) -> "EncodedFiles":
        """Those files only."""
        rows = list(rows)
        features, audio_vectors = (part if part is None else part[rows] for part in (self.features, self.audio_vectors))
        return EncodedFiles(
            [self.scenes[row] for row in rows], [self.media[row] for row in rows], features, audio_vectors
        )

    def batches(self) -> list["EncodedFiles"]:
        """BATCH files at a time."""
        count = len(self.scenes)
        return [self.select(range(first, min(first + BATCH, count))) for first in range(0, count, BATCH)]


def encode_files(model: Model, files: FileSet, seed: int, count: int, log: Callable[[str], None]) -> EncodedFiles:
    """Writes `count` files of a set, reads them as a chat does, and runs the model's frozen encoders on them."""
    log(f"{files.name}: {count} files")
    with tempfile.TemporaryDirectory() as folder:
        parts = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
        work = [(Path(folder), files, seed, numbers, model.config) for numbers in parts]
        read = [one for part in map_in_processes(_write_and_read, work) for one in part]
    scenes, prepared = [one[0] for one in read], [one[1] for one in read]
    features = _encoded(model, "video", [one.frames for one in prepared]) if files.has_frames else None
    audio_vectors = _encoded(model, "audio", [one.mel for one in prepared]) if files.has_audio else None
    return EncodedFiles(scenes, [one.prompt_media for one in prepared], features, audio_vectors)


def _write_and_read(work: tuple[Path, FileSet, int, range, VideoLlamaConfig]) -> list[tuple[Scene, PreparedMedia]]:
    folder, files, seed, numbers, config = work
    found = []
    for number in numbers:
        rng = make_generator(seed, files.name, number)
        scene = randomize_sound(
            draw_scene(rng, files.motions[number % len(files.motions)], "test"), rng, files.match_probability
        )
        path = _write(folder / str(number), files, scene, rng)
        found.append((scene, prepare_media(path, config, require_audio=files.has_audio)))
        path.unlink()
    return found


def _write(stem: Path, files: FileSet, scene: Scene, rng: np.random.Generator) -> Path:
    """The scene as a file of its set's sort."""
    if not files.has_frames:
        path = stem.with_suffix(".wav")
        write_wav(path, scene, rng, seconds=files.seconds, snr_db=files.snr_db)
    elif files.motions == ("rests",) and not files.has_audio:
        path = stem.with_suffix(".jpg")
        write_image(path, scene, rng)
    else:
        path = stem.with_suffix(".mp4")
        write_clip(path, scene, rng, seconds=files.seconds, snr_db=files.snr_db, audio=files.has_audio)
    return path


@functools.cache
def _encoder(sense: str) -> Any:
    if sense == "audio":
        return jax.jit(lambda network, mel: network.embed_audio(mel))
    return jax.jit(lambda network, frames: network.encode_frames(frames))


def _encoded(model: Model, sense: str, given: list[np.ndarray]) -> np.ndarray:
    encode = _encoder(sense)
    groups = [np.stack(given[first : first + BATCH]) for first in range(0, len(given), BATCH)]
    return np.concatenate([np.asarray(encode(model.network, group)) for group in groups])
