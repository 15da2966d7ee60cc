"""Render scenes as frames and images: sprites that move, grow, appear or vanish on a textured, noisy background.

Positions and lengths are fractions of the side of the image, times are fractions of the clip's duration.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

from vllama_jax.media.frame_sampling import frame_indices
from vllama_jax.media.image import resize
from vllama_jax.miniature.scene import COLORS, ObjectGroup, Scene
from vllama_jax.miniature.shapes import draw_shape

FRAME_SIZE = 96  # pixels; not a multiple of the model's 64, so that frames are resampled as those of real videos
FPS, FRAMES = 6, 24
SECONDS = FRAMES / FPS
SAMPLED_FRAMES = frame_indices(FRAMES, 8)  # indices of the frames that a model is given: the first, but not the last
RADIUS = {"small": 0.165, "large": 0.265}
THIRDS = (0.26, 0.5, 0.74)  # centers of PLACES along one axis
HALVES = {2: ((0.28, 0.5), (0.72, 0.5)), 3: ((0.25, 0.3), (0.75, 0.3), (0.5, 0.74))}  # centers of two or three objects
QUARTERS = ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73))  # centers of four objects


@dataclasses.dataclass(frozen=True)
class SpriteGroup:
    """The sprites of one object group in one clip.

    Attributes:
        tiles: An RGBA image of each object.
        starts: The center (x, y) of each object at the start of the clip.
        ends: The center (x, y) of each object at the end.
        radii: The radius of the objects at the start and at the end.
        visible: The time when they appear and the time when they disappear.
    """

    tiles: list[Image.Image]
    starts: list[tuple[float, float]]
    ends: list[tuple[float, float]]
    radii: tuple[float, float]
    visible: tuple[float, float]


def render_frames(scene: Scene, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Render a clip.

    The clip's time is 0.5 in the middle of the *sampled* frames. The sampled frames of a clip and of its reverse then
    differ only in their order (before compression), so that the positions alone do not reveal the direction.

    Yields:
        FRAMES frames, each uint8 [FRAME_SIZE, FRAME_SIZE, 3].
    """
    background, sprites = _draw_background(rng), _draw_sprites(scene, rng)
    for progress in np.minimum(0.5 + (np.arange(FRAMES) - SAMPLED_FRAMES.mean()) / FRAMES, 1.0):
        yield _compose_frame(background, sprites, progress, rng)


def render_image(scene: Scene, rng: np.random.Generator, side: int = FRAME_SIZE) -> tuple[np.ndarray, ObjectGroup]:
    """Render one image of a scene at a random time at which one of its groups is visible.

    Args:
        scene: The scene.
        rng: The generator.
        side: The width and height of the image, in pixels.

    Returns:
        The image, uint8 [side, side, 3], and the visible group with its place at that time.
    """
    sprites = _draw_sprites(scene, rng)
    index = int(rng.integers(len(sprites)))
    first, last = sprites[index].visible
    progress = rng.uniform(first + 0.01, last - 0.01)
    frame = _compose_frame(_draw_background(rng), sprites, progress, rng)
    if side != FRAME_SIZE:
        frame = np.asarray(resize(Image.fromarray(frame), (side, side), Image.Resampling.BILINEAR))
    column, row = (min(int(3 * coordinate), 2) for coordinate in _get_center(sprites[index], 0, progress))
    return frame, dataclasses.replace(scene.objects[index], place=3 * row + column)


def _draw_sprites(scene: Scene, rng: np.random.Generator) -> list[SpriteGroup]:
    if len(scene.objects) == 1:
        return [_draw_sprite_group(scene.objects[0], rng, (0.0, 1.0))]
    first, second = scene.objects
    return [_draw_sprite_group(first, rng, (0.0, 0.5)), _draw_sprite_group(second, rng, (0.5, 1.0))]


def _draw_sprite_group(group: ObjectGroup, rng: np.random.Generator, visible: tuple[float, float]) -> SpriteGroup:
    light = rng.uniform(0.85, 1.1)
    tiles = []
    for _ in range(group.number):
        color = np.array(COLORS[group.color]) * light + rng.uniform(-12, 12, 3)
        tile = draw_shape(group.kind, tuple(np.clip(color, 0, 255).astype(int).tolist()))
        tiles.append(tile.rotate(rng.uniform(-14, 14), Image.Resampling.BILINEAR))
    starts, ends = _draw_endpoints(group, rng)
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


def _draw_endpoints(group: ObjectGroup, rng: np.random.Generator) -> tuple[list, list]:
    """Draw the centers of the objects at the start and at the end of the clip."""
    if group.motion in ("left", "right", "up", "down"):
        start, end = rng.uniform(0.68, 0.8), rng.uniform(0.2, 0.32)
        offset = rng.uniform(0.28, 0.72)
        if group.motion in ("right", "down"):
            start, end = end, start
        if group.motion in ("left", "right"):
            return [(start, offset)], [(end, offset)]
        return [(offset, start)], [(offset, end)]
    if group.number == 1:
        centers = [(THIRDS[group.place % 3], THIRDS[group.place // 3])]
    else:
        centers = list(QUARTERS if group.number == 4 else HALVES[group.number])
        if group.number < 4 and rng.random() < 0.5:
            centers = [(y, x) for x, y in centers]
    jittered = [(x + rng.uniform(-0.045, 0.045), y + rng.uniform(-0.045, 0.045)) for x, y in centers]
    return jittered, jittered


def _get_center(group: SpriteGroup, number: int, progress: float) -> tuple[float, float]:
    """Return the center (x, y) of an object at a time; y points down."""
    (x0, y0), (x1, y1) = group.starts[number], group.ends[number]
    return x0 + progress * (x1 - x0), y0 + progress * (y1 - y0)


def _draw_background(rng: np.random.Generator) -> np.ndarray:
    """Draw a gray texture with patches, stripes and a faint color: float32 [FRAME_SIZE, FRAME_SIZE, 3]."""
    cells = int(rng.integers(3, 9))
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    texture = np.asarray(resize(coarse, (FRAME_SIZE, FRAME_SIZE), Image.Resampling.BICUBIC)) * rng.uniform(5, 22)
    rows, columns = np.mgrid[:FRAME_SIZE, :FRAME_SIZE] / FRAME_SIZE
    angle, cycles = rng.uniform(0, math.pi), rng.uniform(3, 14)
    along = columns * math.cos(angle) + rows * math.sin(angle)
    texture = texture + rng.uniform(0, 10) * np.sin(2 * math.pi * cycles * along + rng.uniform(0, 7))
    return (rng.uniform(60, 125) + rng.uniform(-14, 14, 3) + texture[..., None]).astype(np.float32)


def _compose_frame(
    background: np.ndarray, sprites: list[SpriteGroup], progress: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw the visible sprites on the background, and add noise."""
    canvas = Image.fromarray(np.clip(background, 0, 255).astype(np.uint8))
    for group in sprites:
        if not group.visible[0] <= progress <= group.visible[1]:
            continue
        radius = group.radii[0] + progress * (group.radii[1] - group.radii[0])
        size = max(4, round(2 * radius * FRAME_SIZE))
        for number, tile in enumerate(group.tiles):
            small = resize(tile, (size, size), Image.Resampling.BOX if size > 24 else Image.Resampling.BILINEAR)
            x, y = _get_center(group, number, progress)
            canvas.paste(small, (round(x * FRAME_SIZE - size / 2), round(y * FRAME_SIZE - size / 2)), small)
    noise = rng.standard_normal((FRAME_SIZE, FRAME_SIZE, 3), np.float32) * 7
    return np.clip(np.asarray(canvas, np.float32) + noise, 0, 255).astype(np.uint8)
