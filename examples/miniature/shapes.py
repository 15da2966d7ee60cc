"""Draw the shape of each kind of object: an outline filled with its color, with dark and light details.

Shapes are ellipses, polygons and lines in the square from -1 to 1; y points down.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

TILE = 128  # pixels of the square, before it is resized
DARK, LIGHT = (25, 25, 30), (235, 235, 225)

Color = tuple[int, int, int]


class Pen:
    """Draws in the square from -1 to 1 on a transparent tile, with a default color."""

    def __init__(self, color: Color):
        self.color = color
        self.tile = Image.new("RGBA", (TILE, TILE))
        self._draw = ImageDraw.Draw(self.tile)

    def ellipse(self, x: float, y: float, width: float, height: float | None = None, fill: Color | None = None) -> None:
        """Draw an ellipse with center (x, y); `width` and `height` are its radii."""
        height = width if height is None else height
        corners = self._pixels([(x - width, y - height), (x + width, y + height)])
        self._draw.ellipse(corners, fill=fill or self.color)

    def polygon(self, points: Sequence[tuple[float, float]], fill: Color | None = None) -> None:
        """Draw a polygon."""
        self._draw.polygon(self._pixels(points), fill=fill or self.color)

    def rectangle(self, left: float, top: float, right: float, bottom: float, fill: Color | None = None) -> None:
        """Draw a rectangle."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill)

    def line(self, points: Sequence[tuple[float, float]], width: float = 0.1, fill: Color = DARK) -> None:
        """Draw a line through points."""
        self._draw.line(self._pixels(points), fill=fill, width=round(width * TILE / 2), joint="curve")

    def ring(self, x: float, y: float, size: float, width: float = 0.12, fill: Color | None = None) -> None:
        """Draw a circle with center (x, y) and radius `size`."""
        corners = self._pixels([(x - size, y - size), (x + size, y + size)])
        self._draw.ellipse(corners, outline=fill or self.color, width=round(width * TILE / 2))

    def _pixels(self, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [((x + 1) / 2 * (TILE - 1), (y + 1) / 2 * (TILE - 1)) for x, y in points]


def bell(pen: Pen) -> None:
    pen.ellipse(0, -0.8, 0.16)
    pen.ellipse(0, -0.15, 0.55, 0.65)
    pen.polygon([(-0.55, -0.1), (0.55, -0.1), (0.95, 0.62), (-0.95, 0.62)])
    pen.line([(-0.8, 0.42), (0.8, 0.42)], 0.1)
    pen.ellipse(0, 0.75, 0.22, fill=DARK)


def drum(pen: Pen) -> None:
    pen.rectangle(-0.85, -0.4, 0.85, 0.6)
    pen.ellipse(0, 0.6, 0.85, 0.3)
    pen.line([(-0.85, -0.3), (-0.45, 0.75), (0, -0.2), (0.45, 0.75), (0.85, -0.3)], 0.1)
    pen.ellipse(0, -0.4, 0.85, 0.32, LIGHT)
    pen.line([(-0.15, -0.4), (0.6, -0.95)], 0.12)


def bird(pen: Pen) -> None:
    pen.ellipse(-0.05, 0.15, 0.6, 0.42)
    pen.ellipse(0.5, -0.35, 0.32)
    pen.polygon([(0.75, -0.5), (1.0, -0.3), (0.75, -0.2)], DARK)
    pen.polygon([(-0.5, 0.1), (-1.0, -0.35), (-1.0, 0.3)])
    pen.polygon([(-0.3, 0.05), (0.3, 0.05), (-0.25, -0.75)])
    pen.ellipse(0.55, -0.42, 0.08, fill=DARK)
    pen.line([(-0.1, 0.5), (-0.1, 0.95)], 0.08)
    pen.line([(0.15, 0.5), (0.15, 0.95)], 0.08)


def car(pen: Pen) -> None:
    pen.rectangle(-1.0, -0.05, 1.0, 0.5)
    pen.polygon([(-0.6, 0), (-0.4, -0.55), (0.35, -0.55), (0.65, 0)])
    pen.polygon([(-0.42, -0.05), (-0.3, -0.42), (0.25, -0.42), (0.42, -0.05)], LIGHT)
    for x in (-0.55, 0.55):
        pen.ellipse(x, 0.5, 0.3, fill=DARK)
        pen.ellipse(x, 0.5, 0.12, fill=LIGHT)


def siren(pen: Pen) -> None:
    pen.rectangle(-0.75, 0.55, 0.75, 0.9, DARK)
    pen.ellipse(0, 0.25, 0.5, 0.55)
    pen.rectangle(-0.5, 0.25, 0.5, 0.58)
    for x, y in ((-0.95, -0.1), (-0.65, -0.7), (0, -0.98), (0.65, -0.7), (0.95, -0.1)):
        pen.line([(x * 0.68, 0.25 + (y - 0.25) * 0.68), (x, y)], 0.14, LIGHT)


def dog(pen: Pen) -> None:
    pen.ellipse(0, 0, 0.6, 0.7)
    pen.ellipse(-0.72, -0.05, 0.25, 0.6, DARK)
    pen.ellipse(0.72, -0.05, 0.25, 0.6, DARK)
    pen.ellipse(0, 0.45, 0.42, 0.42)
    pen.ellipse(0, 0.28, 0.2, 0.14, DARK)
    pen.ellipse(-0.25, -0.2, 0.1, fill=DARK)
    pen.ellipse(0.25, -0.2, 0.1, fill=DARK)
    pen.ellipse(0, 0.7, 0.13, 0.22, LIGHT)


def cat(pen: Pen) -> None:
    pen.ellipse(0, 0.2, 0.75, 0.65)
    for side in (-1, 1):
        pen.polygon([(side * 0.72, 0.1), (side * 0.75, -0.95), (side * 0.12, -0.35)])
        pen.ellipse(side * 0.3, 0.05, 0.12, 0.17, LIGHT)
        pen.ellipse(side * 0.3, 0.05, 0.05, 0.15, DARK)
        pen.line([(side * 0.2, 0.42), (side * 1.0, 0.3)], 0.05)
        pen.line([(side * 0.2, 0.5), (side * 1.0, 0.6)], 0.05)
    pen.polygon([(-0.12, 0.3), (0.12, 0.3), (0, 0.45)], DARK)


def clock(pen: Pen) -> None:
    pen.ellipse(0, 0, 0.95)
    pen.ellipse(0, 0, 0.7, fill=LIGHT)
    pen.line([(0, 0), (0, -0.58)], 0.14)
    pen.line([(0, 0), (0.4, 0.2)], 0.14)
    pen.ellipse(0, 0, 0.12, fill=DARK)


def horn(pen: Pen) -> None:
    pen.polygon([(-0.9, -0.12), (0.1, -0.2), (0.95, -0.8), (0.95, 0.8), (0.1, 0.2), (-0.9, 0.12)])
    pen.ellipse(0.92, 0, 0.14, 0.75, DARK)
    pen.ring(-0.35, 0.3, 0.32, 0.16)
    pen.rectangle(-1.0, -0.22, -0.85, 0.22, DARK)


def flute(pen: Pen) -> None:
    pen.polygon([(-1.0, 0.65), (-0.75, 0.95), (1.0, -0.65), (0.75, -0.95)])
    for step in (-0.5, -0.2, 0.1, 0.4):
        pen.ellipse(step, -step * 0.91, 0.1, fill=DARK)
    pen.line([(0.6, -0.82), (0.86, -0.53)], 0.08, LIGHT)


def guitar(pen: Pen) -> None:
    pen.ellipse(-0.35, 0.4, 0.58)
    pen.ellipse(0.12, -0.08, 0.42)
    pen.line([(0.05, -0.02), (0.9, -0.9)], 0.2)
    pen.ellipse(-0.15, 0.2, 0.2, fill=DARK)
    pen.line([(-0.62, 0.62), (-0.4, 0.84)], 0.1)
    pen.line([(0.7, -0.95), (0.98, -0.7)], 0.12, LIGHT)


def phone(pen: Pen) -> None:
    pen.rectangle(-0.55, -0.95, 0.55, 0.95)
    pen.rectangle(-0.4, -0.72, 0.4, 0.0, DARK)
    for row in (0.22, 0.48, 0.74):
        for column in (-0.28, 0, 0.28):
            pen.ellipse(column, row, 0.1, fill=LIGHT)


def cloud(pen: Pen) -> None:
    pen.ellipse(-0.5, -0.2, 0.45)
    pen.ellipse(0.1, -0.45, 0.5)
    pen.ellipse(0.6, -0.15, 0.38)
    pen.rectangle(-0.6, -0.3, 0.7, 0.22)
    pen.polygon([(0.05, 0.2), (-0.35, 0.7), (-0.02, 0.66), (-0.2, 1.0), (0.4, 0.5), (0.08, 0.52), (0.3, 0.2)], LIGHT)


def bee(pen: Pen) -> None:
    pen.ellipse(-0.3, -0.5, 0.28, 0.48, LIGHT)
    pen.ellipse(0.25, -0.5, 0.28, 0.48, LIGHT)
    pen.ellipse(0, 0.2, 0.85, 0.45)
    for x in (-0.45, -0.1, 0.25):
        pen.rectangle(x, -0.18, x + 0.17, 0.58, DARK)
    pen.polygon([(-0.8, 0.1), (-1.0, 0.2), (-0.8, 0.3)], DARK)
    pen.ellipse(0.65, 0.12, 0.1, fill=DARK)


def frog(pen: Pen) -> None:
    pen.ellipse(0, 0.3, 0.9, 0.55)
    for side in (-1, 1):
        pen.ellipse(side * 0.5, -0.35, 0.32)
        pen.ellipse(side * 0.5, -0.38, 0.2, fill=LIGHT)
        pen.ellipse(side * 0.5, -0.38, 0.1, fill=DARK)
    pen.line([(-0.6, 0.3), (-0.3, 0.5), (0.3, 0.5), (0.6, 0.3)], 0.1)


def kettle(pen: Pen) -> None:
    pen.ellipse(0, 0.3, 0.62, 0.58)
    pen.rectangle(-0.5, 0.6, 0.5, 0.88)
    pen.polygon([(0.4, 0.3), (0.98, -0.35), (1.0, -0.05), (0.55, 0.6)])
    pen.ring(0, -0.25, 0.55, 0.13, DARK)
    pen.ellipse(0, 0.3, 0.6, 0.5)
    pen.ellipse(0, -0.22, 0.14, fill=DARK)
    pen.line([(-0.5, 0.55), (0.5, 0.55)], 0.08, LIGHT)


SHAPES: dict[str, Callable[[Pen], None]] = {
    shape.__name__: shape
    for shape in (
        bell, drum, bird, car, siren, dog, cat, clock, horn, flute, guitar, phone, cloud, bee, frog, kettle
    )
}  # fmt: skip


@functools.cache
def shape_mask(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decompose a shape, so that it can be drawn in any color.

    The shape is drawn in black and in white; the difference is the share of the color.

    Args:
        kind: The kind of the object.

    Returns:
        The opacity [TILE, TILE], the share of the color [TILE, TILE], and the RGB values of details [TILE, TILE, 3].
    """
    tiles = []
    for color in ((0, 0, 0), (255, 255, 255)):
        pen = Pen(color)
        SHAPES[kind](pen)
        tiles.append(np.asarray(pen.tile, np.float32))
    alpha = tiles[0][..., 3] / 255
    color_share = (tiles[1][..., 0] - tiles[0][..., 0]) / 255
    return alpha, color_share, tiles[0][..., :3]


def draw_shape(kind: str, color: Color) -> Image.Image:
    """Draw a kind of object in a color: an RGBA tile with a transparent background."""
    alpha, color_share, details = shape_mask(kind)
    tile = np.empty((TILE, TILE, 4), np.uint8)
    tile[..., :3] = details + color_share[..., None] * np.array(color, np.float32)
    tile[..., 3] = alpha * 255
    return Image.fromarray(tile, "RGBA")
