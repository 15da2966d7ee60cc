"""Scenes: objects with a kind, color, size, number and place, their motion, and the sounds that are heard.

A scene is symbolic. render.py makes frames of it, synthesis.py audio, and texts.py captions, questions and answers.
Some combinations of kind, color and motion are held out of training (`is_held_out`); measures use only these.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

# Each kind of object, and the verb for its sound.
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
PLACES = (  # of an object's center, in thirds of the image, row by row
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
# "in turn": an object is visible in one half of the clip, a second object in the other half.
MOTIONS: tuple[Motion, ...] = ("rests", *DIRECTIONS, *CHANGES, "in turn")
Split = Literal["train", "test"]

HOLDOUT_INTERVAL = 7  # one in this many combinations of kind, color and motion is held out


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectGroup:
    """One object, or several with the same properties.

    Attributes:
        kind: A key of KINDS.
        color: A key of COLORS.
        size: One of SIZES; ignored where the motion changes the size.
        number: How many objects, 1 to 4. More than one only at rest.
        place: An index into PLACES. Defined only for one object at rest.
        motion: One of MOTIONS.
    """

    kind: str
    color: str
    size: str = "large"
    number: int = 1
    place: int = 4
    motion: Motion = "rests"


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is visible and audible in a clip.

    Attributes:
        objects: One group, or two that are shown one after the other.
        sounds: The kinds that are heard, in order; empty for silence.
    """

    objects: tuple[ObjectGroup, ...]
    sounds: tuple[str, ...] = ()


def is_held_out(kind: str, color: str, motion: Motion) -> bool:
    """Return whether this combination is held out of training.

    Held-out combinations form a Latin square: every pair of kind, color and motion occurs in training.
    """
    number = list(KINDS).index(kind) + 2 * list(COLORS).index(color) + 3 * MOTIONS.index(motion)
    return number % HOLDOUT_INTERVAL == 0


def motion_of(scene: Scene) -> Motion:
    """Return the motion of the group that is shown first."""
    return scene.objects[0].motion


def draw_motion(
    rng: np.random.Generator, motions: Sequence[Motion], probabilities: Sequence[float] | None = None
) -> Motion:
    """Draw one of the motions, uniformly unless probabilities are given."""
    return motions[int(rng.choice(len(motions), p=probabilities))]


def draw_objects(
    rng: np.random.Generator, motion: Motion, split: Split, *, kind: str | None = None, number: int = 1
) -> ObjectGroup:
    """Draw a group of objects whose combination of kind, color and motion belongs to the split.

    Args:
        rng: The generator.
        motion: The motion of the group.
        split: "train" or "test" (held-out combinations).
        kind: The kind of the objects; drawn if None.
        number: How many objects.

    Returns:
        The group, with a random color, size and place. Several objects are small.
    """
    kinds = list(KINDS) if kind is None else [kind]
    while True:
        kind, color = rng.choice(kinds), rng.choice(list(COLORS))
        if is_held_out(kind, color, motion) == (split == "test"):
            size = "small" if number > 1 else str(rng.choice(SIZES))
            place = int(rng.integers(len(PLACES)))
            return ObjectGroup(kind=str(kind), color=str(color), size=size, number=number, place=place, motion=motion)


def draw_scene(rng: np.random.Generator, motion: Motion | None = None, split: Split = "train") -> Scene:
    """Draw a scene whose sounds match its objects. The motion is drawn if None."""
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
    """Keep the scene's sound with a probability; otherwise replace it with the sound of another kind."""
    if rng.random() < match_probability:
        return scene
    others = [kind for kind in KINDS if kind != scene.objects[0].kind]
    return Scene(scene.objects, (str(rng.choice(others)),))


def draw_number(rng: np.random.Generator) -> int:
    """Draw the number of objects at rest: one in half of the cases, otherwise 2, 3 or 4."""
    return int(rng.choice([1, 1, 1, 2, 3, 4]))
