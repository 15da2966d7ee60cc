"""Write the training data of the miniature: clips with audio, images, annotations, and records.

world/captions, world/instructions   media and annotations.jsonl of stage 1 and stage 2, for both branches
world/records/…                      the same as records directories (vllama data build)
"""

import dataclasses
import json
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from vllama_jax.io.atomic import new_directory
from vllama_jax.media.write import write_video
from vllama_jax.miniature import render, texts
from vllama_jax.miniature.images import map_in_processes
from vllama_jax.miniature.scene import CHANGES, DIRECTIONS, Motion, Scene, draw_motion, draw_scene
from vllama_jax.miniature.synthesis import SAMPLE_RATE, soundtrack

# Directions are what claim 1 is about; claim 2 needs two objects in turn.
MOTION_PROBABILITIES: dict[Motion, float] = {
    **dict.fromkeys(DIRECTIONS, 0.11),
    **dict.fromkeys(CHANGES, 0.035),
    "in turn": 0.38,
    "rests": 0.04,
}
MAX_QUESTIONS = 4  # of one dialogue
CHUNK_SIZE = 100  # files that a process writes at a time


@dataclasses.dataclass(frozen=True)
class Amounts:
    """The number of clips and images (stills) of each dataset."""

    caption_clips: int = 2600
    caption_stills: int = 1200
    instruction_clips: int = 4400
    instruction_stills: int = 1600


def write_world(out: Path, amounts: Amounts, seed: int, log: Callable[[str], None]) -> None:
    """Write the datasets that `out` does not have yet. Each becomes visible only when it is complete.

    Args:
        out: The directory of the world.
        amounts: The number of clips and images.
        seed: The seed of all scenes.
        log: Called with progress messages.
    """
    from vllama_jax.data.build import build

    numbers = dataclasses.asdict(amounts)
    for index, name in enumerate(("captions", "instructions")):
        if (out / name).exists():
            continue
        singular = name.removesuffix("s")
        counts = {"clip": numbers[f"{singular}_clips"], "still": numbers[f"{singular}_stills"]}
        with new_directory(out / name) as directory:
            work = [
                (directory, name, form, first, min(CHUNK_SIZE, count - first), [seed, 2, index])
                for form, count in counts.items()
                for first in range(0, count, CHUNK_SIZE)
            ]
            log(f"{out / name}: writing {counts['clip']} clips and {counts['still']} images")
            lines = [line for written in map_in_processes(_write_part, work) for line in written]
            (directory / "annotations.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("captions", "instructions"):
        if not (out / "records" / name).exists():
            build("jsonl", out / name, out / "records" / name)


def _write_part(work: tuple[Path, str, str, int, int, list[int]]) -> list[str]:
    """Write one chunk of media files, in a worker process, and return their lines of annotations.jsonl."""
    folder, name, form, first, count, seed = work
    lines = []
    for number in range(first, first + count):
        rng = np.random.default_rng([*seed, form == "still", number])
        if form == "still":
            scene, file = draw_scene(rng, "rests"), f"{form}{number:05d}.jpg"
            write_image(folder / file, scene, rng)
        else:
            motion = draw_motion(rng, list(MOTION_PROBABILITIES), list(MOTION_PROBABILITIES.values()))
            scene, file = draw_scene(rng, motion), f"{form}{number:05d}.mp4"
            write_clip(folder / file, scene, rng, snr_db=float(rng.uniform(0, 30)))
        media = {"image" if form == "still" else "video": file}
        text = {"caption": texts.caption(scene)} if name == "captions" else _draw_messages(scene, rng)
        lines.append(json.dumps({**media, **text}))
    return lines


def _draw_messages(scene: Scene, rng: np.random.Generator) -> dict[str, list[dict[str, str]]]:
    pairs = texts.draw_dialogue(scene, rng, MAX_QUESTIONS)
    return {"QA": [{"q": question, "a": answer} for question, answer in pairs]}


def write_clip(
    path: Path,
    scene: Scene,
    rng: np.random.Generator,
    *,
    seconds: float = render.SECONDS,
    snr_db: float | None = None,
    audio: bool = True,
) -> None:
    """Write a scene as an mp4 file with H.264 and AAC.

    Args:
        path: The file to write.
        scene: The scene.
        rng: The generator.
        seconds: The duration.
        snr_db: The signal-to-noise ratio of white noise in the audio, in dB; no noise if None.
        audio: Whether the file has an audio stream.
    """
    waveform = soundtrack(scene.sounds, seconds, rng, snr_db) if audio else None
    write_video(path, render.render_frames(scene, rng), render.FRAMES / seconds, waveform, SAMPLE_RATE)


def write_wav(
    path: Path,
    scene: Scene,
    rng: np.random.Generator,
    *,
    seconds: float = render.SECONDS,
    snr_db: float | None = None,
) -> None:
    """Write the audio of a scene as a 16-bit WAV file. The arguments are those of `write_clip`."""
    samples = np.rint(soundtrack(scene.sounds, seconds, rng, snr_db)[0] * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, len(samples), "NONE", ""))
        file.writeframes(samples.tobytes())


def write_image(path: Path, scene: Scene, rng: np.random.Generator) -> None:
    """Write one frame of a scene as a JPEG file."""
    Image.fromarray(render.render_image(scene, rng)[0]).save(path, quality=int(rng.integers(70, 96)))


def make_generator(seed: int, name: str, number: int) -> np.random.Generator:
    """Return the generator of one evaluation file. Training data uses other seeds."""
    return np.random.default_rng([seed, 3, *name.encode(), number])
