"""The world as files: clips with sound and stills, what is said of them, and the records that a run reads.

world/captions, world/instructions   media, annotations.jsonl: stage 1 and stage 2 of both branches
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

# How often a clip has each motion: ways are what the first claim is about, turns what the second needs.
MOTION_PROBABILITIES: dict[Motion, float] = {
    **dict.fromkeys(DIRECTIONS, 0.11),
    **dict.fromkeys(CHANGES, 0.035),
    "in turn": 0.38,
    "rests": 0.04,
}
TURNS = 4  # questions about one clip, at most
PART = 100  # files that one process writes at a time


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How many clips and stills each part of the world has."""

    caption_clips: int = 2600
    caption_stills: int = 1200
    instruction_clips: int = 4400
    instruction_stills: int = 1600


def write_world(out: Path, amounts: Amounts, seed: int, log: Callable[[str], None]) -> None:
    """Makes what is not there yet, each part whole or not at all."""
    from vllama_jax.data.build import build

    numbers = dataclasses.asdict(amounts)
    for part, name in enumerate(("captions", "instructions")):
        if (out / name).exists():
            continue
        singular = name.removesuffix("s")
        wanted = [("clip", numbers[f"{singular}_clips"]), ("still", numbers[f"{singular}_stills"])]
        with new_directory(out / name) as directory:
            work = [
                (directory, name, form, first, min(PART, count - first), [seed, 2, part])
                for form, count in wanted
                for first in range(0, count, PART)
            ]
            log(f"{out / name}: writing {wanted[0][1]} clips and {wanted[1][1]} stills")
            lines = [line for written in map_in_processes(_write_part, work) for line in written]
            (directory / "annotations.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("captions", "instructions"):
        if not (out / "records" / name).exists():
            build("jsonl", out / name, out / "records" / name)


def _write_part(work: tuple[Path, str, str, int, int, list[int]]) -> list[str]:
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
        named = {"image" if form == "still" else "video": file}
        said = {"caption": texts.caption(scene)} if name == "captions" else _messages(scene, rng)
        lines.append(json.dumps({**named, **said}))
    return lines


def _messages(scene: Scene, rng: np.random.Generator) -> dict[str, list[dict[str, str]]]:
    pairs = texts.draw_dialogue(scene, rng, TURNS)
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
    """An mp4 of the scene: H.264, and AAC unless `sound` is off. snr_db: of white noise in the sound, None for none."""
    sounds = soundtrack(scene.sounds, seconds, rng, snr_db) if audio else None
    write_video(path, render.render_frames(scene, rng), render.FRAMES / seconds, sounds, SAMPLE_RATE)


def write_wav(
    path: Path,
    scene: Scene,
    rng: np.random.Generator,
    *,
    seconds: float = render.SECONDS,
    snr_db: float | None = None,
) -> None:
    """A WAV of what is heard of the scene, in 16 bits; as write_clip's sound."""
    samples = np.rint(soundtrack(scene.sounds, seconds, rng, snr_db)[0] * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, len(samples), "NONE", ""))
        file.writeframes(samples.tobytes())


def write_image(path: Path, scene: Scene, rng: np.random.Generator) -> None:
    """A JPEG of the scene."""
    Image.fromarray(render.render_image(scene, rng)[0]).save(path, quality=int(rng.integers(70, 96)))


def make_generator(seed: int, name: str, number: int) -> np.random.Generator:
    """The generator of one file of tests, which no part of training has."""
    return np.random.default_rng([seed, 3, *name.encode(), number])
