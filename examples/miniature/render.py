"""A scene → pictures: things on a textured, noisy ground, each drawn once and then moved, grown, shown or hidden."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

from vllama_jax.media.image import resize
from vllama_jax.media.video import frame_indices
from vllama_jax.miniature.scene import COLOURS, Scene, Things
from vllama_jax.miniature.shapes import draw_shape

SIDE = 96  # pixels of a clip's frame; no multiple of what a patch of the model sees
FPS, FRAMES = 6, 24
SECONDS = FRAMES / FPS
READ = frame_indices(FRAMES, 8)  # the frames of a clip that a model sees: the first, not the last
RADIUS = {"small": 0.165, "large": 0.265}  # of the picture's side
THIRDS = (0.26, 0.5, 0.74)  # where the middles of places are
HALVES = {2: ((0.28, 0.5), (0.72, 0.5)), 3: ((0.25, 0.3), (0.75, 0.3), (0.5, 0.74))}
QUARTERS = ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Things as they are drawn in one clip: a tile for each, where its middle is, and when they are there.

    Places and radius at the beginning and the end of the clip, as parts of its side; `seen` as parts of its time.
    """

    tiles: list[Image.Image]
    starts: list[tuple[float, float]]
    ends: list[tuple[float, float]]
    radii: tuple[float, float]
    seen: tuple[float, float]


def clip_frames(scene: Scene, draw: np.random.Generator) -> Iterator[np.ndarray]:
    """The FRAMES frames of a clip, uint8 [SIDE, SIDE, 3].

    Half of the time is over in the middle of the frames that are read: a clip and the same backwards are then alike in
    all but their frames' order (before compression), and no part of a thing's way tells which way it is.
    """
    ground, drawn = _ground(draw), _draw_all(scene, draw)
    for time in np.minimum(0.5 + (np.arange(FRAMES) - READ.mean()) / FRAMES, 1.0):
        yield _frame(ground, drawn, time, draw)


def picture(scene: Scene, draw: np.random.Generator, side: int = SIDE) -> tuple[np.ndarray, Things]:
    """One frame, uint8 [side, side, 3], of a moment when something is shown; and that, where it is at this moment."""
    drawn = _draw_all(scene, draw)
    which = int(draw.integers(len(drawn)))
    first, last = drawn[which].seen
    time = draw.uniform(first + 0.01, last - 0.01)
    frame = _frame(_ground(draw), drawn, time, draw)
    if side != SIDE:
        frame = np.asarray(resize(Image.fromarray(frame), (side, side), Image.Resampling.BILINEAR))
    column, row = (min(int(3 * part), 2) for part in _middle(drawn[which], 0, time))
    return frame, dataclasses.replace(scene.shown[which], place=3 * row + column)


def _draw_all(scene: Scene, draw: np.random.Generator) -> list[Drawn]:
    if len(scene.shown) == 1:
        return [_draw_things(scene.shown[0], draw, (0.0, 1.0))]
    turn = 0.5
    return [_draw_things(scene.shown[0], draw, (0.0, turn)), _draw_things(scene.shown[1], draw, (turn, 1.0))]


def _draw_things(things: Things, draw: np.random.Generator, seen: tuple[float, float]) -> Drawn:
    light = draw.uniform(0.85, 1.1)
    tiles = []
    for _ in range(things.number):
        colour = np.array(COLOURS[things.colour]) * light + draw.uniform(-12, 12, 3)
        tile = draw_shape(things.kind, tuple(np.clip(colour, 0, 255).astype(int).tolist()))
        tiles.append(tile.rotate(draw.uniform(-14, 14), Image.Resampling.BILINEAR))
    starts, ends = _paths(things, draw)
    radius = RADIUS[things.size] * draw.uniform(0.9, 1.1)
    radii = (radius, radius)
    if things.motion in ("grows", "shrinks"):
        radii = (draw.uniform(0.11, 0.14), draw.uniform(0.27, 0.31))
        radii = radii if things.motion == "grows" else radii[::-1]
    if things.motion == "appears":
        seen = (draw.uniform(0.3, 0.65), 1.0)
    elif things.motion == "vanishes":
        seen = (0.0, draw.uniform(0.35, 0.7))
    return Drawn(tiles, starts, ends, radii, seen)


def _paths(things: Things, draw: np.random.Generator) -> tuple[list, list]:
    """Where the middles of the things are at the beginning and at the end."""
    if things.motion in ("left", "right", "up", "down"):
        before, after = draw.uniform(0.68, 0.8), draw.uniform(0.2, 0.32)
        across = draw.uniform(0.28, 0.72)
        if things.motion in ("right", "down"):
            before, after = after, before
        if things.motion in ("left", "right"):
            return [(before, across)], [(after, across)]
        return [(across, before)], [(across, after)]
    if things.number == 1:
        middles = [(THIRDS[things.place % 3], THIRDS[things.place // 3])]
    else:
        middles = list(QUARTERS if things.number == 4 else HALVES[things.number])
        if things.number < 4 and draw.random() < 0.5:
            middles = [(y, x) for x, y in middles]
    jittered = [(x + draw.uniform(-0.045, 0.045), y + draw.uniform(-0.045, 0.045)) for x, y in middles]
    return jittered, jittered


def _middle(things: Drawn, number: int, time: float) -> tuple[float, float]:
    """Where the middle of one of the things is, as parts of the side: to the right, and down."""
    (x0, y0), (x1, y1) = things.starts[number], things.ends[number]
    return x0 + time * (x1 - x0), y0 + time * (y1 - y0)


def _ground(draw: np.random.Generator) -> np.ndarray:
    """A dull texture, float32 [SIDE, SIDE, 3]: patches of light and dark, stripes, a faint colour."""
    cells = int(draw.integers(3, 9))
    coarse = Image.fromarray(draw.uniform(-1, 1, (cells, cells)).astype(np.float32))
    texture = np.asarray(resize(coarse, (SIDE, SIDE), Image.Resampling.BICUBIC)) * draw.uniform(5, 22)
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    angle, waves = draw.uniform(0, math.pi), draw.uniform(3, 14)
    along = columns * math.cos(angle) + rows * math.sin(angle)
    texture = texture + draw.uniform(0, 10) * np.sin(2 * math.pi * waves * along + draw.uniform(0, 7))
    return (draw.uniform(60, 125) + draw.uniform(-14, 14, 3) + texture[..., None]).astype(np.float32)


def _frame(ground: np.ndarray, drawn: list[Drawn], time: float, draw: np.random.Generator) -> np.ndarray:
    """What is seen at `time`, a part of the clip's."""
    picture = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    for things in drawn:
        if not things.seen[0] <= time <= things.seen[1]:
            continue
        radius = things.radii[0] + time * (things.radii[1] - things.radii[0])
        size = max(4, round(2 * radius * SIDE))
        for number, tile in enumerate(things.tiles):
            small = resize(tile, (size, size), Image.Resampling.BOX if size > 24 else Image.Resampling.BILINEAR)
            x, y = _middle(things, number, time)
            picture.paste(small, (round(x * SIDE - size / 2), round(y * SIDE - size / 2)), small)
    noise = draw.standard_normal((SIDE, SIDE, 3), np.float32) * 7
    return np.clip(np.asarray(picture, np.float32) + noise, 0, 255).astype(np.uint8)
