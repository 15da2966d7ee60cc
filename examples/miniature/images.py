"""Pictures with what can be said of them, drawn in memory: what the frozen parts that see are trained on."""

import atexit
import dataclasses
import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from vllama_jax.data.workers import WorkerPool
from vllama_jax.miniature import render, texts
from vllama_jax.miniature.scene import COLORS, KINDS, NUMBERS, PLACES, ObjectGroup, Split, draw_scene

IMAGE_SIZE = 64  # pixels of a side, as the model sees a picture
ASPECTS = ("kind", "colour", "number", "size", "place")  # that a phrase can be about
NO_PHRASE = -1  # in place of a phrase: it means nothing of this picture
WORKERS = 2


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """pixels: uint8 [n, IMAGE_SIZE, IMAGE_SIZE, 3]. things: what each shows, and where at this moment."""

    pixels: np.ndarray
    objects: list[ObjectGroup]

    @property
    def captions(self) -> list[str]:
        return [texts.image_caption(objects) for objects in self.objects]


def draw_images(count: int, seed: int, split: Split = "train") -> ImageSet:
    """Moments of scenes of all kinds, compressed a little as the files are that the model will see."""
    parts = map_in_processes(_draw_part, [(seed, part, size, split) for part, size in enumerate(_parts(count))])
    pixels = np.concatenate([part[0] for part in parts])
    return ImageSet(pixels, [objects for part in parts for objects in part[1]])


def _draw_part(part: tuple[int, int, int, Split]) -> tuple[np.ndarray, list[ObjectGroup]]:
    seed, number, count, split = part
    rng = np.random.default_rng([seed, 1, number, split == "test"])
    pixels, objects = [], []
    for _ in range(count):
        scene = draw_scene(rng, "rests" if rng.random() < 0.35 else None, split)
        frame, shown = render.render_image(scene, rng, IMAGE_SIZE)
        pixels.append(compressed(frame, int(rng.integers(50, 96))))
        objects.append(shown)
    return np.stack(pixels), objects


def compressed(frame: np.ndarray, quality: int) -> np.ndarray:
    """A picture as it comes back from a JPEG of this quality."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))


def phrases() -> dict[str, list[str]]:
    """The short captions of each aspect."""
    return {
        "kind": [f"a {kind}" for kind in KINDS],
        "colour": [f"something {color}" for color in COLORS],
        "number": [f"{number} things" if number != "one" else "one thing" for number in NUMBERS],
        "size": ["something small", "something large"],
        "place": list(PLACES),
    }


def phrase_ids(images: ImageSet) -> np.ndarray:
    """Which phrase of each aspect is true of each picture, NOTHING where none is: int32 [n, aspects]."""
    kinds, colours = list(KINDS), list(COLORS)
    rows = []
    for one in images.objects:
        size = NO_PHRASE if one.motion in ("grows", "shrinks") else int(one.size == "large")
        place = one.place if one.number == 1 else NO_PHRASE
        rows.append((kinds.index(one.kind), colours.index(one.color), one.number - 1, size, place))
    return np.array(rows, np.int32)


def map_in_processes(work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """`work` on each item, in processes of their own; results in order."""
    return list(_workers().map(work, items))


@functools.cache
def _workers() -> WorkerPool:
    """Kept for all calls, as they take seconds to start."""
    workers = WorkerPool(WORKERS)
    atexit.register(workers.close)
    return workers


def _parts(count: int, size: int = 1000) -> list[int]:
    return [min(size, count - first) for first in range(0, count, size)]
