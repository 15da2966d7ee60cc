"""A scene → pictures: things on a textured, noisy ground, each drawn once and then moved, grown, shown or hidden."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

from vllama_jax.media.image import resize
from vllama_jax.media.video import frame_indices
from vllama_jax.miniature.scene import COLORS, ObjectGroup, Scene
from vllama_jax.miniature.shapes import draw_shape

FRAME_SIZE = 96  # pixels of a clip's frame; no multiple of what a patch of the model sees
FPS, FRAMES = 6, 24
SECONDS = FRAMES / FPS
SAMPLED_FRAMES = frame_indices(FRAMES, 8)  # the frames of a clip that a model sees: the first, not the last
RADIUS = {"small": 0.165, "large": 0.265}  # of the picture's side
THIRDS = (0.26, 0.5, 0.74)  # where the middles of places are
HALVES = {2: ((0.28, 0.5), (0.72, 0.5)), 3: ((0.25, 0.3), (0.75, 0.3), (0.5, 0.74))}
QUARTERS = ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73))


@dataclasses.dataclass(frozen=True)
class SpriteGroup:
    """Things as they are drawn in one clip: a tile for each, where its middle is, and when they are there.

    Places and radius at the beginning and the end of the clip, as parts of its side; `seen` as parts of its time.
    """

    tiles: list[Image.Image]
    starts: list[tuple[float, float]]
    ends: list[tuple[float, float]]
    radii: tuple[float, float]
    visible: tuple[float, float]


def render_frames(scene: Scene, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The FRAMES frames of a clip, uint8 [SIDE, SIDE, 3].

    Half of the time is over in the middle of the frames that are read: a clip and the same backwards are then alike in
    all but their frames' order (before compression), and no part of a thing's way tells which way it is.
    """
    ground, drawn = _ground(rng), _draw_all(scene, rng)
    for time in np.minimum(0.5 + (np.arange(FRAMES) - SAMPLED_FRAMES.mean()) / FRAMES, 1.0):
        yield _frame(ground, drawn, time, rng)


def render_image(scene: Scene, rng: np.random.Generator, side: int = FRAME_SIZE) -> tuple[np.ndarray, ObjectGroup]:
    """One frame, uint8 [side, side, 3], of a moment when something is shown; and that, where it is at this moment."""
    drawn = _draw_all(scene, rng)
    which = int(rng.integers(len(drawn)))
    first, last = drawn[which].visible
    time = rng.uniform(first + 0.01, last - 0.01)
    frame = _frame(_ground(rng), drawn, time, rng)
    if side != FRAME_SIZE:
        frame = np.asarray(resize(Image.fromarray(frame), (side, side), Image.Resampling.BILINEAR))
    column, row = (min(int(3 * part), 2) for part in _middle(drawn[which], 0, time))
    return frame, dataclasses.replace(scene.objects[which], place=3 * row + column)


def _draw_all(scene: Scene, rng: np.random.Generator) -> list[SpriteGroup]:
    if len(scene.objects) == 1:
        return [_draw_things(scene.objects[0], rng, (0.0, 1.0))]
    turn = 0.5
    return [_draw_things(scene.objects[0], rng, (0.0, turn)), _draw_things(scene.objects[1], rng, (turn, 1.0))]


def _draw_things(group: ObjectGroup, rng: np.random.Generator, visible: tuple[float, float]) -> SpriteGroup:
    light = rng.uniform(0.85, 1.1)
    tiles = []
    for _ in range(group.number):
        color = np.array(COLORS[group.color]) * light + rng.uniform(-12, 12, 3)
        tile = draw_shape(group.kind, tuple(np.clip(color, 0, 255).astype(int).tolist()))
        tiles.append(tile.rotate(rng.uniform(-14, 14), Image.Resampling.BILINEAR))
    starts, ends = _paths(group, rng)
    radius = RADIUS[group.size] * rng.uniform(0.9, 1.1)
    radii = (radius, radius)
    if group.motion in ("grows", "shrinks"):
        radii = (rng.uniform(0.11, 0.14), rng.uniform(0.27, 0.31))
        radii = radii if group.motion == "grows" else radii[::-1]
    if group.motion == "appears":
        visible = (rng.uniform(0.3, 0.65), 1.0)
    elif group.motion == "vanishes":
        visible = (0.0, rng.uniform(0.35, 0.7))
    return SpriteGroup(tiles, starts, ends, radii, visible)


def _paths(group: ObjectGroup, rng: np.random.Generator) -> tuple[list, list]:
    """Where the middles of the things are at the beginning and at the end."""
    if group.motion in ("left", "right", "up", "down"):
        before, after = rng.uniform(0.68, 0.8), rng.uniform(0.2, 0.32)
        across = rng.uniform(0.28, 0.72)
        if group.motion in ("right", "down"):
            before, after = after, before
        if group.motion in ("left", "right"):
            return [(before, across)], [(after, across)]
        return [(across, before)], [(across, after)]
    if group.number == 1:
        middles = [(THIRDS[group.place % 3], THIRDS[group.place // 3])]
    else:
        middles = list(QUARTERS if group.number == 4 else HALVES[group.number])
        if group.number < 4 and rng.random() < 0.5:
            middles = [(y, x) for x, y in middles]
    jittered = [(x + rng.uniform(-0.045, 0.045), y + rng.uniform(-0.045, 0.045)) for x, y in middles]
    return jittered, jittered


def _middle(group: SpriteGroup, number: int, time: float) -> tuple[float, float]:
    """Where the middle of one of the things is, as parts of the side: to the right, and down."""
    (x0, y0), (x1, y1) = group.starts[number], group.ends[number]
    return x0 + time * (x1 - x0), y0 + time * (y1 - y0)


def _ground(rng: np.random.Generator) -> np.ndarray:
    """A dull texture, float32 [SIDE, SIDE, 3]: patches of light and dark, stripes, a faint colour."""
    cells = int(rng.integers(3, 9))
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    texture = np.asarray(resize(coarse, (FRAME_SIZE, FRAME_SIZE), Image.Resampling.BICUBIC)) * rng.uniform(5, 22)
    rows, columns = np.mgrid[:FRAME_SIZE, :FRAME_SIZE] / FRAME_SIZE
    angle, waves = rng.uniform(0, math.pi), rng.uniform(3, 14)
    along = columns * math.cos(angle) + rows * math.sin(angle)
    texture = texture + rng.uniform(0, 10) * np.sin(2 * math.pi * waves * along + rng.uniform(0, 7))
    return (rng.uniform(60, 125) + rng.uniform(-14, 14, 3) + texture[..., None]).astype(np.float32)


def _frame(ground: np.ndarray, drawn: list[SpriteGroup], time: float, rng: np.random.Generator) -> np.ndarray:
    """What is seen at `time`, a part of the clip's."""
    picture = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    for group in drawn:
        if not group.visible[0] <= time <= group.visible[1]:
            continue
        radius = group.radii[0] + time * (group.radii[1] - group.radii[0])
        size = max(4, round(2 * radius * FRAME_SIZE))
        for number, tile in enumerate(group.tiles):
            small = resize(tile, (size, size), Image.Resampling.BOX if size > 24 else Image.Resampling.BILINEAR)
            x, y = _middle(group, number, time)
            picture.paste(small, (round(x * FRAME_SIZE - size / 2), round(y * FRAME_SIZE - size / 2)), small)
    noise = rng.standard_normal((FRAME_SIZE, FRAME_SIZE, 3), np.float32) * 7
    return np.clip(np.asarray(picture, np.float32) + noise, 0, 255).astype(np.uint8)
