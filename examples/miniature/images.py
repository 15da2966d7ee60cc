"""Labeled images, rendered in memory: the training data of the vision towers and of the image Q-Former."""

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

IMAGE_SIZE = 64  # pixels, of the model's input
ASPECTS = ("kind", "colour", "number", "size", "place")  # a phrase describes one of them
NO_PHRASE = -1  # label of an image for which the aspect is undefined
WORKERS = 2


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images and the objects in them.

    Attributes:
        pixels: uint8 [n, IMAGE_SIZE, IMAGE_SIZE, 3].
        objects: The group that each image shows, with its place at that time.
    """

    pixels: np.ndarray
    objects: list[ObjectGroup]

    @property
    def captions(self) -> list[str]:
        """The caption of each image."""
        return [texts.image_caption(group) for group in self.objects]


def draw_images(count: int, seed: int, split: Split = "train") -> ImageSet:
    """Render frames of random scenes, with JPEG artifacts as files have them.

    Args:
        count: How many images.
        seed: The seed.
        split: "train" or "test" (held-out combinations).
    """
    work = [(seed, number, size, split) for number, size in enumerate(_split_into_chunks(count))]
    chunks = map_in_processes(_draw_chunk, work)
    pixels = np.concatenate([chunk[0] for chunk in chunks])
    return ImageSet(pixels, [group for chunk in chunks for group in chunk[1]])


def _draw_chunk(work: tuple[int, int, int, Split]) -> tuple[np.ndarray, list[ObjectGroup]]:
    seed, number, count, split = work
    rng = np.random.default_rng([seed, 1, number, split == "test"])
    pixels, objects = [], []
    for _ in range(count):
        scene = draw_scene(rng, "rests" if rng.random() < 0.35 else None, split)
        frame, group = render.render_image(scene, rng, IMAGE_SIZE)
        pixels.append(compress_jpeg(frame, int(rng.integers(50, 96))))
        objects.append(group)
    return np.stack(pixels), objects


def compress_jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    """Encode an image as JPEG with this quality, and decode it."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))


def phrases() -> dict[str, list[str]]:
    """Return the phrases of each aspect, such as "a bell", "something red" or "at the top"."""
    return {
        "kind": [f"a {kind}" for kind in KINDS],
        "colour": [f"something {color}" for color in COLORS],
        "number": [f"{number} things" if number != "one" else "one thing" for number in NUMBERS],
        "size": ["something small", "something large"],
        "place": list(PLACES),
    }


def phrase_ids(images: ImageSet) -> np.ndarray:
    """Return the label of each image for each aspect: an index into `phrases()[aspect]`, or NO_PHRASE.

    Returns:
        int32 [n, aspects].
    """
    kinds, colors = list(KINDS), list(COLORS)
    rows = []
    for group in images.objects:
        size = NO_PHRASE if group.motion in ("grows", "shrinks") else int(group.size == "large")
        place = group.place if group.number == 1 else NO_PHRASE
        rows.append((kinds.index(group.kind), colors.index(group.color), group.number - 1, size, place))
    return np.array(rows, np.int32)


def map_in_processes(work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """Call `work` on each item in worker processes, and return the results in order."""
    return list(_get_workers().map(work, items))


@functools.cache
def _get_workers() -> WorkerPool:
    """Start the workers once for all calls, as this takes seconds."""
    workers = WorkerPool(WORKERS)
    atexit.register(workers.close)
    return workers


def _split_into_chunks(count: int, size: int = 1000) -> list[int]:
    return [min(size, count - first) for first in range(0, count, size)]
