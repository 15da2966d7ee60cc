"""Captions of scenes, questions in several wordings, dialogues, answers, and the comparison of answers.

The last wording of each question is for evaluation: only the language model is trained on it, no branch is.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

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
AUDIO_QUESTIONS = ("hear", "hear_first", "hear_last", "fit")  # not in the training data of the branches
VISUAL_QUESTIONS = ("object", "colour", "size", "count", "place", "motion", "describe", "fit")  # need frames
NO_AUDIO = "I hear nothing: no audio was given"
NO_FRAMES = "I see nothing: no image or video was given"
NO_MEDIA = "I see nothing and hear nothing: no media was given"
ALL_MEDIA = ("audio", "video")
ABSENT_PROBABILITY = 0.15  # of a question about media that are absent, in a dialogue about others
OPPOSITES: dict[Motion, Motion] = {"left": "right", "right": "left", "up": "down", "down": "up"}


def caption(scene: Scene) -> str:
    """Return the caption of a scene.

    Examples: "a large red bell moves to the left", "three small blue drums", "first …, then …".
    """
    if len(scene.objects) == 2:
        first, second = (noun_phrase(group) for group in scene.objects)
        return f"first {first}, then {second}"
    (group,) = scene.objects
    if group.motion == "rests":
        return image_caption(group)
    return f"{noun_phrase(group)} {motion(group.motion)}"


def image_caption(group: ObjectGroup) -> str:
    """Return the caption of one frame of a group; it has the place if the group is one object."""
    return noun_phrase(group) + (f" {PLACES[group.place]}" if group.number == 1 else "")


def noun_phrase(group: ObjectGroup) -> str:
    """Return a noun phrase such as "a large red bell"; without a size if the size changes."""
    size = "" if group.motion in ("grows", "shrinks") else f"{group.size} "
    if group.number == 1:
        words = f"{size}{group.color} {group.kind}"
        return f"{'an' if words[0] == 'o' else 'a'} {words}"
    return f"{NUMBERS[group.number - 1]} {size}{group.color} {group.kind}s"


def motion(name: str) -> str:
    """Return the verb phrase of a motion, such as "moves to the left" or "grows"."""
    return f"moves {DIRECTION_PHRASES[name]}" if name in DIRECTIONS else name


def list_questions(scene: Scene) -> list[str]:
    """Return the names of the QUESTIONS that apply to the objects of a scene."""
    if len(scene.objects) == 2:
        return ["first", "last", "describe"]
    (group,) = scene.objects
    names = ["object", "colour", "describe"]
    if group.motion not in ("grows", "shrinks"):
        names.append("size")
    if group.motion == "rests":
        names.append("count")
        names += ["place"] if group.number == 1 else []
    else:
        names.append("motion")
    return names


def list_unanswerable(media: Collection[str]) -> list[str]:
    """Return the names of the QUESTIONS about media that are absent.

    Args:
        media: The kinds of media that are given, as in `Media.placeholders`.
    """
    if not media:
        return list(QUESTIONS)
    if "audio" not in media:
        return list(AUDIO_QUESTIONS)
    return list(VISUAL_QUESTIONS) if set(media) == {"audio"} else []


def answer(question: str, scene: Scene, media: Collection[str] = ALL_MEDIA) -> str:
    """Return the reference answer to one of the QUESTIONS.

    Args:
        question: The name of the question.
        scene: The scene.
        media: The kinds of media that are given, as in `Media.placeholders`.
    """
    if question in list_unanswerable(media):
        return NO_MEDIA if not media else NO_FRAMES if "audio" in media else NO_AUDIO
    return ANSWERS[question](scene)


def compare_kinds(audible: str, visible: str) -> str:
    """Return the answer whether the audible kind matches the visible one: both kinds, then yes or no."""
    return f"a {audible} is heard and a {visible} is seen, so {'yes' if audible == visible else 'no'}"


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


def is_correct(question: str, prediction: str, scene: Scene, media: Collection[str] = ALL_MEDIA) -> bool:
    """Return whether a prediction is equivalent to the reference answer. The arguments are those of `answer`."""
    return answer_key(question, prediction) == answer_key(question, answer(question, scene, media))


def answer_key(question: str, text: str) -> str:
    """Extract the words of an answer that are compared.

    These are the kind, the direction, or yes or no. Of other questions, the whole answer is compared. Of an answer that
    nothing is seen or heard, only that is compared.
    """
    text = text.lower()
    if absences := [words for words in ("see nothing", "hear nothing") if words in text]:
        return " and ".join(absences)
    words = text.strip(" .!").replace(",", "").split()
    if question == "fit":
        return words[-1] if words else ""
    if question in ("object", "first", "last", "hear", "hear_first", "hear_last"):
        singular = [word.removesuffix("s") if word.removesuffix("s") in KINDS else word for word in words]
        return next((word for word in singular if word in KINDS), "")
    if question == "motion":
        return next((word for word in words if word in MOTIONS), "")
    return " ".join(words)


def draw_dialogue(scene: Scene, rng: np.random.Generator, turns: int, *, wordings: int = 3) -> list[tuple[str, str]]:
    """Draw a dialogue about a scene.

    Args:
        scene: The scene.
        rng: The generator.
        turns: The maximum number of questions; their order is random.
        wordings: How many wordings of each question to draw from, at most 4.

    Returns:
        Pairs of a question and its reference answer.
    """
    names = rng.permutation(list_questions(scene))[:turns]
    return [(QUESTIONS[name][rng.integers(wordings)], answer(name, scene)) for name in map(str, names)]


def draw_questions(
    answerable: Sequence[str], unanswerable: Sequence[str], rng: np.random.Generator, turns: int
) -> list[tuple[str, str]]:
    """Draw the questions of a dialogue, in all wordings.

    Each question is about absent media with ABSENT_PROBABILITY. A question is repeated, in another wording, only after
    all others of its group.

    Args:
        answerable: Names of QUESTIONS about the media. A name that is given twice is asked twice as often.
        unanswerable: Names of QUESTIONS about absent media.
        rng: The generator.
        turns: The number of questions. If `answerable` has too few wordings, the others are about absent media; if
            both have too few, there are fewer questions.

    Returns:
        Pairs of a name and a wording.
    """
    groups = [list(_order_questions(names, rng))[::-1] for names in (answerable, unanswerable)]
    questions: list[tuple[str, str]] = []
    while len(questions) < turns and any(groups):
        preferred = groups[int(rng.random() < ABSENT_PROBABILITY)]
        questions.append((preferred or groups[0] or groups[1]).pop())
    return questions


def _order_questions(names: Sequence[str], rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Yield each name with each of its wordings, in rounds of all names."""
    wordings = {name: list(map(str, rng.permutation(QUESTIONS[name]))) for name in names}
    while any(wordings.values()):
        for name in map(str, rng.permutation(names)):
            if wordings[name]:
                yield name, wordings[name].pop()
