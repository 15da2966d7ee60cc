"""What there is in the small world: things of some kind, colour, size, number and place, and what becomes of them.

A scene says what is shown and heard, in words; render.py and sounds.py make pictures and sound of it, texts.py says it.
Some combinations of kind, colour and motion are never trained on (`is_held_out`), so that a test is of new ones.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

# Each kind of thing, and what it does when it is heard.
KINDS = {
    "bell": "rings",
    "drum": "beats",
    "bird": "chirps",
    "car": "hums",
    "siren": "wails",
    "dog": "barks",
    "cat": "meows",
    "clock": "ticks",
    "horn": "honks",
    "flute": "plays",
    "guitar": "strums",
    "phone": "beeps",
    "cloud": "thunders",
    "bee": "buzzes",
    "frog": "croaks",
    "kettle": "hisses",
}
COLORS = {
    "red": (215, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 225, 50),
    "green": (50, 175, 60),
    "blue": (50, 90, 225),
    "purple": (140, 55, 190),
    "pink": (250, 150, 195),
    "white": (245, 245, 245),
}
SIZES = ("small", "large")
NUMBERS = ("one", "two", "three", "four")
PLACES = (  # of the middle of a thing, in thirds of the picture, row by row
    "at the upper left",
    "at the top",
    "at the upper right",
    "at the left",
    "in the middle",
    "at the right",
    "at the lower left",
    "at the bottom",
    "at the lower right",
)

Motion = Literal["rests", "left", "right", "up", "down", "grows", "shrinks", "appears", "vanishes", "in turn"]
DIRECTIONS: tuple[Motion, ...] = ("left", "right", "up", "down")
CHANGES: tuple[Motion, ...] = ("grows", "shrinks", "appears", "vanishes")
# "in turn": shown for half of the time, another thing for the other half.
MOTIONS: tuple[Motion, ...] = ("rests", *DIRECTIONS, *CHANGES, "in turn")
Split = Literal["train", "test"]

HOLDOUT_INTERVAL = 7  # one combination in so many is kept for tests


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectGroup:
    """One thing, or several alike. `place` is a number in PLACES, and means something only for one thing at rest."""

    kind: str
    color: str
    size: str = "large"
    number: int = 1
    place: int = 4
    motion: Motion = "rests"


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is shown, two of them one after the other; and the kinds that are heard, in order, none in silence."""

    objects: tuple[ObjectGroup, ...]
    sounds: tuple[str, ...] = ()


def is_held_out(kind: str, color: str, motion: Motion) -> bool:
    """Whether this combination is for tests only.

    A Latin square: every two of the three occur together in training, whatever they are.
    """
    number = list(KINDS).index(kind) + 2 * list(COLORS).index(color) + 3 * MOTIONS.index(motion)
    return number % HOLDOUT_INTERVAL == 0


def motion_of(scene: Scene) -> Motion:
    """What becomes of the things that the scene shows first."""
    return scene.objects[0].motion


def draw_motion(
    rng: np.random.Generator, motions: Sequence[Motion], probabilities: Sequence[float] | None = None
) -> Motion:
    """One of these motions, each equally likely unless probabilities are given."""
    return motions[int(rng.choice(len(motions), p=probabilities))]


def draw_objects(
    rng: np.random.Generator, motion: Motion, split: Split, *, kind: str | None = None, number: int = 1
) -> ObjectGroup:
    """Things of any kind unless given, any colour, size and place, of a combination that belongs to the split."""
    kinds = list(KINDS) if kind is None else [kind]
    while True:
        kind, color = rng.choice(kinds), rng.choice(list(COLORS))
        if is_held_out(kind, color, motion) == (split == "test"):
            size = "small" if number > 1 else str(rng.choice(SIZES))
            place = int(rng.integers(len(PLACES)))
            return ObjectGroup(kind=str(kind), color=str(color), size=size, number=number, place=place, motion=motion)


def draw_scene(rng: np.random.Generator, motion: Motion | None = None, split: Split = "train") -> Scene:
    """A scene with one motion, any unless given; it is heard as it looks."""
    motion = motion or draw_motion(rng, MOTIONS)
    if motion == "in turn":
        first = draw_objects(rng, motion, split)
        while True:
            second = draw_objects(rng, motion, split)
            if second.kind != first.kind:
                return Scene((first, second), (first.kind, second.kind))
    group = draw_objects(rng, motion, split, number=draw_number(rng) if motion == "rests" else 1)
    return Scene((group,), (group.kind,))


def randomize_sound(scene: Scene, rng: np.random.Generator, match_probability: float = 0.5) -> Scene:
    """The scene, heard as it looks in that part of cases, and as another kind sounds in the others."""
    if rng.random() < match_probability:
        return scene
    others = [kind for kind in KINDS if kind != scene.objects[0].kind]
    return Scene(scene.objects, (str(rng.choice(others)),))


def draw_number(rng: np.random.Generator) -> int:
    """How many things are at rest: one in half of the pictures."""
    return int(rng.choice([1, 1, 1, 2, 3, 4]))
