"""What is said of scenes: captions, questions in several wordings, answers, and whether an answer is right.

The last wording of each question is for tests: no branch is trained on it, only the language model has read it.
"""

from collections.abc import Callable, Mapping

import numpy as np

from vllama_jax.miniature.scene import DIRECTIONS, KINDS, MOTIONS, NUMBERS, PLACES, Motion, ObjectGroup, Scene

DIRECTION_PHRASES = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}

QUESTIONS: dict[str, tuple[str, ...]] = {
    "object": ("What is it?", "What is shown?", "Which thing do you see?", "Name the thing."),
    "colour": ("Which colour is it?", "What colour does it have?", "Tell me the colour.", "How is it coloured?"),
    "size": ("How large is it?", "Which size is it?", "Is it small or large?", "Tell me the size."),
    "count": ("How many are there?", "How many do you see?", "Count them.", "What is their number?"),
    "place": ("Where is it?", "In which place is it?", "Where do you see it?", "Tell me the place."),
    "motion": ("What does it do?", "Which way does it go?", "How does it move?", "Describe its motion."),
    "first": ("What comes first?", "What do you see first?", "Which thing is first?", "Name the first thing."),
    "last": ("What comes last?", "What do you see last?", "Which thing is last?", "Name the last thing."),
    "describe": ("Describe it.", "What happens?", "What is happening?", "Tell me what you see."),
    "hear": ("What do you hear?", "What can you hear?", "What makes the sound?", "Name the sound."),
    "hear_first": (
        "What do you hear first?",
        "Which sound comes first?",
        "What sounds first?",
        "Name the first sound.",
    ),
    "hear_last": ("What do you hear last?", "Which sound comes last?", "What sounds last?", "Name the last sound."),
    "fit": (
        "Does the sound fit the picture?",
        "Do the sound and the picture fit?",
        "Is the sound of what you see?",
        "Do sound and picture agree?",
    ),
}
AUDIO_QUESTIONS = ("hear", "hear_first", "hear_last", "fit")  # never asked when a branch is trained
OPPOSITES: dict[Motion, Motion] = {"left": "right", "right": "left", "up": "down", "down": "up"}


def caption(scene: Scene) -> str:
    """What a scene shows: "a large red bell moves to the left", "three small blue drums", "first …, then …"."""
    if len(scene.objects) == 2:
        first, second = (noun_phrase(group) for group in scene.objects)
        return f"first {first}, then {second}"
    (group,) = scene.objects
    if group.motion == "rests":
        return image_caption(group)
    return f"{noun_phrase(group)} {motion(group.motion)}"


def image_caption(group: ObjectGroup) -> str:
    """What one moment of a scene shows, and where, if it is one thing."""
    return noun_phrase(group) + (f" {PLACES[group.place]}" if group.number == 1 else "")


def noun_phrase(group: ObjectGroup) -> str:
    """ "a large red bell", "three small blue drums"; what changes its size has none."""
    size = "" if group.motion in ("grows", "shrinks") else f"{group.size} "
    if group.number == 1:
        words = f"{size}{group.color} {group.kind}"
        return f"{'an' if words[0] == 'o' else 'a'} {words}"
    return f"{NUMBERS[group.number - 1]} {size}{group.color} {group.kind}s"


def motion(name: str) -> str:
    """ "moves to the left", "grows"."""
    return f"moves {DIRECTION_PHRASES[name]}" if name in DIRECTIONS else name


def list_questions(scene: Scene) -> list[str]:
    """The names in QUESTIONS that can be asked about what the scene shows."""
    if len(scene.objects) == 2:
        return ["first", "last", "describe"]
    (group,) = scene.objects
    asked = ["object", "colour", "describe"]
    if group.motion not in ("grows", "shrinks"):
        asked.append("size")
    if group.motion == "rests":
        asked.append("count")
        asked += ["place"] if group.number == 1 else []
    else:
        asked.append("motion")
    return asked


def answer(question: str, scene: Scene) -> str:
    """The right answer to a question of QUESTIONS."""
    return ANSWERS[question](scene)


def compare_kinds(sounds: str, seen: str) -> str:
    """Whether what is heard fits what is seen: the two kinds, then yes or no."""
    return f"a {sounds} is heard and a {seen} is seen, so {'yes' if sounds == seen else 'no'}"


ANSWERS: Mapping[str, Callable[[Scene], str]] = {
    "object": lambda scene: (
        f"a {scene.objects[0].kind}" if scene.objects[0].number == 1 else f"{scene.objects[0].kind}s"
    ),
    "colour": lambda scene: scene.objects[0].color,
    "size": lambda scene: scene.objects[0].size,
    "count": lambda scene: NUMBERS[scene.objects[0].number - 1],
    "place": lambda scene: PLACES[scene.objects[0].place],
    "motion": lambda scene: f"it {motion(scene.objects[0].motion)}",
    "first": lambda scene: f"a {scene.objects[0].kind}",
    "last": lambda scene: f"a {scene.objects[-1].kind}",
    "describe": caption,
    "hear": lambda scene: f"a {scene.sounds[0]} {KINDS[scene.sounds[0]]}",
    "hear_first": lambda scene: f"a {scene.sounds[0]} {KINDS[scene.sounds[0]]}",
    "hear_last": lambda scene: f"a {scene.sounds[-1]} {KINDS[scene.sounds[-1]]}",
    "fit": lambda scene: compare_kinds(scene.sounds[0], scene.objects[0].kind),
}


def is_correct(question: str, said: str, scene: Scene) -> bool:
    """Whether an answer means what the right one does."""
    return answer_key(question, said) == answer_key(question, answer(question, scene))


def answer_key(question: str, said: str) -> str:
    """What of an answer counts: the kind, the place, the way, yes or no; all of a description."""
    words = said.lower().strip(" .!").replace(",", "").split()
    if question == "fit":
        return words[-1] if words else ""
    if question in ("object", "first", "last", "hear", "hear_first", "hear_last"):
        known = [word.removesuffix("s") if word.removesuffix("s") in KINDS else word for word in words]
        return next((word for word in known if word in KINDS), "")
    if question == "motion":
        return next((word for word in words if word in MOTIONS), "")
    return " ".join(words)


def draw_dialogue(scene: Scene, rng: np.random.Generator, turns: int, *, wordings: int = 3) -> list[tuple[str, str]]:
    """Questions in any order and some of the wordings, each with its answer."""
    asked = rng.permutation(list_questions(scene))[:turns]
    return [(QUESTIONS[name][rng.integers(wordings)], answer(name, scene)) for name in map(str, asked)]
