"""Files of held-out scenes, and their features: the inputs of all measures (evaluate.py)."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vllama_jax.config import VideoLlamaConfig
from vllama_jax.media_tokens import PreparedMedia, prepare_media
from vllama_jax.miniature import render
from vllama_jax.miniature.images import map_in_processes
from vllama_jax.miniature.scene import DIRECTIONS, Motion, Scene, draw_scene, randomize_sound
from vllama_jax.miniature.world import make_generator, write_clip, write_image, write_wav
from vllama_jax.model import Model
from vllama_jax.text.prompts import Media

BATCH = 50  # files that are written, encoded or asked about at a time


@dataclasses.dataclass(frozen=True)
class FileSet:
    """A set of files of one type.

    The type is WAV without frames, JPEG for objects at rest without audio, and mp4 otherwise.

    Attributes:
        name: Part of the seed of each file.
        motions: The motions of the scenes, which alternate.
        has_audio: Whether files have audio.
        has_frames: Whether files have frames.
        match_probability: The probability that the audio of a scene matches its frames.
        snr_db: The signal-to-noise ratio of white noise in the audio, in dB.
        seconds: The duration of clips and audio files.
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
TWO_SHORT = FileSet("two", ("in turn",), has_audio=True, has_frames=False)  # most audio clips contain both sounds
TWO_SOUNDS = dataclasses.replace(TWO_SHORT, seconds=2 * render.SECONDS)
BOTH = FileSet("both", DIRECTIONS, has_audio=True, match_probability=0.5)


@dataclasses.dataclass(frozen=True)
class EncodedFiles:
    """The outputs of the frozen encoders for n files.

    Attributes:
        scenes: The scene of each file.
        media: The description of each file in a prompt.
        features: Features of frames, float32 [n, t, q, d]; None for audio files.
        audio_vectors: Embeddings of audio clips, float32 [n, s, e]; None without audio.
    """

    scenes: list[Scene]
    media: list[Media]
    features: np.ndarray | None
    audio_vectors: np.ndarray | None

    @property
    def placeholders(self) -> tuple[str, ...]:
        """The kinds of media that are used of each file, as in `Media.placeholders`; an image is a video here."""
        kinds = (("audio", self.audio_vectors), ("video", self.features))
        return tuple(kind for kind, array in kinds if array is not None)

    def require_features(self) -> np.ndarray:
        """Return the features of frames, of a set that has frames."""
        assert self.features is not None
        return self.features

    def require_audio_vectors(self) -> np.ndarray:
        """Return the audio vectors, of a set that has audio."""
        assert self.audio_vectors is not None
        return self.audio_vectors

    def select(self, rows: Sequence[int]) -> "EncodedFiles":
        """Return a subset of the files."""
        rows = list(rows)
        features, audio_vectors = (
            array if array is None else array[rows] for array in (self.features, self.audio_vectors)
        )
        return EncodedFiles(
            [self.scenes[row] for row in rows], [self.media[row] for row in rows], features, audio_vectors
        )

    def batches(self) -> list["EncodedFiles"]:
        """Divide the files into batches of at most BATCH."""
        count = len(self.scenes)
        return [self.select(range(first, min(first + BATCH, count))) for first in range(0, count, BATCH)]


def encode_files(model: Model, files: FileSet, seed: int, count: int, log: Callable[[str], None]) -> EncodedFiles:
    """Write files, read them as a chat does, and run the model's frozen encoders on them.

    Args:
        model: The model whose encoders are used.
        files: The set of the files.
        seed: The seed of the scenes.
        count: How many files.
        log: Called with progress messages.
    """
    log(f"rendering and encoding {count} files of the set '{files.name}'")
    scenes, prepared = read_files(model.config, files, seed, count)
    features = encode(model, prepared, "frames", "encode_frames") if files.has_frames else None
    audio_vectors = encode(model, prepared, "mel", "embed_audio") if files.has_audio else None
    return EncodedFiles(scenes, [media.prompt_media for media in prepared], features, audio_vectors)


def read_files(
    config: VideoLlamaConfig, files: FileSet, seed: int, count: int
) -> tuple[list[Scene], list[PreparedMedia]]:
    """Write files, and read them as a chat does.

    Args:
        config: The config of the model that the files are prepared for.
        files: The set of the files.
        seed: The seed of the scenes.
        count: How many files.

    Returns:
        The scene and the prepared media of each file.
    """
    with tempfile.TemporaryDirectory() as folder:
        chunks = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
        work = [(Path(folder), files, seed, numbers, config) for numbers in chunks]
        pairs = [pair for results in map_in_processes(_write_and_read, work) for pair in results]
    return [scene for scene, _ in pairs], [media for _, media in pairs]


def _write_and_read(work: tuple[Path, FileSet, int, range, VideoLlamaConfig]) -> list[tuple[Scene, PreparedMedia]]:
    """Write files in a worker process, and return each scene with the media as read."""
    folder, files, seed, numbers, config = work
    pairs = []
    for number in numbers:
        rng = make_generator(seed, files.name, number)
        scene = draw_scene(rng, files.motions[number % len(files.motions)], "test")
        scene = randomize_sound(scene, rng, files.match_probability)
        path = _write(folder / str(number), files, scene, rng)
        pairs.append((scene, prepare_media(path, config, require_audio=files.has_audio)))
        path.unlink()
    return pairs


def _write(stem: Path, files: FileSet, scene: Scene, rng: np.random.Generator) -> Path:
    """Write a scene as a file of the set's type."""
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
def _make_encoder(method: str) -> Any:
    return jax.jit(lambda network, inputs: getattr(network, method)(inputs))


def encode(model: Model, prepared: Sequence[PreparedMedia], array: str, method: str) -> np.ndarray:
    """Encode the frames or the audio of files, in batches.

    Args:
        model: The model.
        prepared: The files. All have the array.
        array: "frames" or "mel".
        method: The method of the network that encodes it: "encode_frames", "embed_frames" or "embed_audio".

    Returns:
        The outputs of all files, stacked: float32 [n, t, q, d], or [n, t or s, e] for embeddings.
    """
    run, inputs = _make_encoder(method), [media.arrays[array] for media in prepared]
    batches = [np.stack(inputs[first : first + BATCH]) for first in range(0, len(inputs), BATCH)]
    return np.concatenate([np.asarray(run(model.network, batch)) for batch in batches])
