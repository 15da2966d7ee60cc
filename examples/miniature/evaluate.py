"""Measure a miniature on newly rendered files of held-out combinations.

A measure is the accuracy of greedily decoded answers to one question about a set of files. Clips are written as mp4 and
images as JPEG, and read as a chat reads them. Audio has white noise 15 dB below it, unless a measure says otherwise.
Measures that shuffle or reverse frames, or scale or permute audio vectors, do so between the frozen encoders and the
Q-Formers of the branches.
"""

import collections
import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from vllama_jax.errors import ConfigError, suggest_name
from vllama_jax.miniature import audio_tower, holdout_files, texts
from vllama_jax.miniature.holdout_files import EncodedFiles, FileSet, encode_files
from vllama_jax.miniature.questions import answer_log_probabilities, ask, ask_dialogues
from vllama_jax.miniature.scene import Scene
from vllama_jax.model import Model

SCALES = (2.0, 5.0, 10.0, 20.0)  # norms of audio vectors besides the model's own; published weights have the last
NOISES = (20.0, 10.0, 5.0, 0.0, -5.0)  # signal-to-noise ratios in dB
PERMUTATIONS = 20
NEW_WORDING = 3  # index of the wording that no branch is trained on
CHANCE_OF_TWO = 0.5  # where only two answers are possible given everything else
CHANCE_OF_NOTHING = 0.0  # of the answer that nothing is heard or seen: a model that always gives another one
DIALOGUE_TURNS = 10
SILENT = (holdout_files.STILLS, holdout_files.MOVING)

Measure = dict[str, float]  # accuracy, n, chance, and low and high of the accuracy's 95 % interval


def measure(correct: Sequence[bool] | Sequence[Sequence[bool]] | np.ndarray, chance: float) -> Measure:
    """Compute the accuracy and Wilson's 95 % interval.

    Answers of a group depend on each other. They are counted as the number of independent answers whose accuracy would
    vary as the accuracy of the groups does.

    Args:
        correct: Whether each answer is correct: bool [n], or [groups, n / groups] for dependent answers.
        chance: The accuracy by chance, which is returned with the others.

    Returns:
        The values by name: accuracy, n, chance, low, high.
    """
    groups = np.asarray(correct, float).reshape(len(correct), -1)
    accuracy, variance = groups.mean(), groups.mean(axis=1).var() / len(groups)
    n = min(accuracy * (1 - accuracy) / variance, groups.size) if variance else groups.size
    z = 1.96
    center = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    values = {"accuracy": accuracy, "n": groups.size, "chance": chance}
    values |= {"low": max(center - half_width, 0), "high": min(center + half_width, 1)}
    return {name: round(value, 4) for name, value in values.items()}


def constant_answer_accuracy(question: str, scenes: Sequence[Scene], media: Collection[str] = texts.ALL_MEDIA) -> float:
    """Return the chance level of a question: the accuracy of always giving the most frequent reference answer."""
    counts = collections.Counter(texts.answer_key(question, texts.answer(question, scene, media)) for scene in scenes)
    return max(counts.values()) / len(scenes)


def check_arguments(seed: int, clips: int, measures: Sequence[str] = ()) -> None:
    """Check the seed, the number of files and the names of the measures.

    Raises:
        ConfigError: The seed is negative, `clips` is below 1, or a measure is unknown.
    """
    if clips < 1 or seed < 0:
        raise ConfigError(f"--clips must be at least 1 and --seed at least 0, not {clips} and {seed}")
    for name in measures:
        if name not in MEASURES:
            advice = f"{suggest_name(name, MEASURES)} There are {', '.join(MEASURES)}".lstrip()
            raise ConfigError(f"--measures {name}: no such measure; {advice}")


class FileSets:
    """The file sets of an evaluation. Each is rendered and encoded at its first use, and then cached."""

    def __init__(self, model: Model, seed: int, clips: int, log: Callable[[str], None]):
        self.model = model
        encode = functools.cache(lambda files: encode_files(model, files, seed, clips, log))
        self._encode: Callable[[FileSet], EncodedFiles] = encode

    def for_model(self, model: Model) -> "FileSets":
        """Return the same encoded files for a model that has the same frozen encoders."""
        sets = copy.copy(self)
        sets.model = model
        return sets

    def with_files(self, encoded: Mapping[FileSet, EncodedFiles]) -> "FileSets":
        """Return file sets that have only these files, which are already encoded."""
        sets = copy.copy(self)
        sets._encode = encoded.__getitem__
        return sets

    def __call__(self, files: FileSet) -> EncodedFiles:
        """Return the encoded files of a set."""
        return self._encode(files)


def evaluate(
    model: Model,
    seed: int,
    clips: int,
    log: Callable[[str], None] = lambda text: None,
    measures: Sequence[str] = (),
) -> dict[str, Measure]:
    """Render files and measure a model on them.

    Args:
        model: A miniature.
        seed: The seed of the files, at least 0.
        clips: How many files each set has.
        log: Called with progress messages.
        measures: Names of MEASURES; all if empty. Only the sets of these measures are rendered.

    Returns:
        The measures by name. A measure without files is left out.

    Raises:
        ConfigError: The seed is negative, `clips` is below 1, or a measure is unknown.
    """
    check_arguments(seed, clips, measures)
    return evaluate_sets(FileSets(model, seed, clips, log), measures)


def evaluate_sets(sets: FileSets, measures: Sequence[str] = ()) -> dict[str, Measure]:
    """Measure the model of file sets.

    Args:
        sets: The file sets.
        measures: Names of MEASURES; all if empty.

    Returns:
        The measures by name. A measure without files is left out.
    """
    results = {name: function(sets) for name, function in MEASURES.items() if name in measures or not measures}
    return {name: result for name, result in results.items() if result is not None}


MeasureFunction = Callable[[FileSets], Measure | None]


def _measure_direction(model: Model, moving: EncodedFiles) -> Measure:
    """Measure how often the correct direction has a higher probability than the opposite one.

    The axis of the motion stays visible in shuffled frames, so chance is 0.5. Free answers would measure direction
    badly, as shuffled frames also look like other motions (an object that vanishes, two objects in turn).
    """
    question = texts.QUESTIONS["motion"][0]
    correct = [texts.answer("motion", scene) for scene in moving.scenes]
    opposite = [texts.answer("motion", _with_opposite_motion(scene)) for scene in moving.scenes]
    log_probabilities = [answer_log_probabilities(model, moving, question, answers) for answers in (correct, opposite)]
    return measure(log_probabilities[0] > log_probabilities[1], CHANCE_OF_TWO)


def _with_opposite_motion(scene: Scene) -> Scene:
    group = scene.objects[0]
    return Scene((dataclasses.replace(group, motion=texts.OPPOSITES[group.motion]),), scene.sounds)


def _shuffle_frames(sets: FileSets) -> EncodedFiles:
    moving, rng = sets(holdout_files.MOVING), np.random.default_rng(0)
    features = moving.require_features()
    orders = np.stack([rng.permutation(features.shape[1]) for _ in moving.scenes])
    return dataclasses.replace(moving, features=np.take_along_axis(features, orders[..., None, None], axis=1))


def _reverse_frames(sets: FileSets) -> EncodedFiles:
    moving = sets(holdout_files.MOVING)
    return dataclasses.replace(moving, features=moving.require_features()[:, ::-1])


def _reverse_frames_and_answers(sets: FileSets) -> EncodedFiles:
    """Reverse the frames, and make the opposite direction the reference answer."""
    reversed_files = _reverse_frames(sets)
    return dataclasses.replace(reversed_files, scenes=[_with_opposite_motion(scene) for scene in reversed_files.scenes])


def _measure_place(sets: FileSets) -> Measure | None:
    """Measure the place of an object in images of one object; None if no image has just one."""
    stills = sets(holdout_files.STILLS)
    single = [number for number, scene in enumerate(stills.scenes) if scene.objects[0].number == 1]
    return _measure_answers(sets.model, stills.select(single), "place") if single else None


def _measure_permuted_vectors(sets: FileSets) -> Measure:
    """Measure recognition from audio vectors whose dimensions are permuted."""
    files, correct = sets(holdout_files.SOUNDS), []
    vectors = files.require_audio_vectors()
    for number in range(PERMUTATIONS):
        order = np.random.default_rng(number).permutation(vectors.shape[-1])
        permuted = dataclasses.replace(files, audio_vectors=vectors[..., order])
        correct.append(_check_answers(sets.model, permuted, "hear"))
    return measure(correct, constant_answer_accuracy("hear", files.scenes))


def _scale_audio_vectors(files: EncodedFiles, scale: float) -> EncodedFiles:
    """Scale the audio vectors to a norm."""
    vectors = files.require_audio_vectors()
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return dataclasses.replace(files, audio_vectors=vectors * (np.float32(scale) / norms))


def _measure_order(model: Model, two: EncodedFiles, first: str = "hear_first", last: str = "hear_last") -> Measure:
    """Measure the answers to the questions for the first and for the last of two sounds."""
    correct = [_check_answers(model, two, name) for name in (first, last)]
    return measure(np.transpose(correct), CHANCE_OF_TWO)


def _measure_answers(
    model: Model, files: EncodedFiles, name: str, *, wording: int = 0, chance: float | None = None
) -> Measure:
    """Measure the answers to a question; chance is `constant_answer_accuracy` unless given."""
    correct = _check_answers(model, files, name, wording)
    return measure(correct, constant_answer_accuracy(name, files.scenes) if chance is None else chance)


def _check_answers(model: Model, files: EncodedFiles, name: str, wording: int = 0) -> list[bool]:
    """Return whether the answer about each file is correct."""
    answers = ask(model, files, texts.QUESTIONS[name][wording])
    return [
        texts.is_correct(name, answer, scene, files.placeholders)
        for answer, scene in zip(answers, files.scenes, strict=True)
    ]


def _make_absence_measure(file_sets: Sequence[FileSet], names: Sequence[str], wording: int = 0) -> MeasureFunction:
    """Make a measure of answers to questions about absent media: correct if they say that nothing is heard or seen."""

    def measure_absence(sets: FileSets) -> Measure:
        correct = [
            np.transpose([_check_answers(sets.model, sets(files), name, wording) for name in names])
            for files in file_sets
        ]
        return measure(np.concatenate(correct), CHANCE_OF_NOTHING)

    return measure_absence


def _measure_false_silence(sets: FileSets) -> Measure:
    """Measure how often the answer is that nothing is heard, although audio is given."""
    question = texts.QUESTIONS["hear"][0]
    answers = [ask(sets.model, sets(files), question) for files in (holdout_files.SOUNDS, holdout_files.BOTH)]
    says_nothing = ["hear nothing" in texts.answer_key("hear", answer) for answer in itertools.chain(*answers)]
    return measure(says_nothing, CHANCE_OF_NOTHING)


def _measure_dialogue(sets: FileSets, turns: int) -> Measure:
    """Measure the last answer of dialogues about silent videos, with questions as in the training of LLaMA.

    A dialogue is the start of one with DIALOGUE_TURNS, so the last questions of all lengths have the same distribution.
    """
    files = sets(holdout_files.MOVING)
    media = files.placeholders
    questions = [
        texts.draw_questions(
            texts.list_questions(scene), texts.list_unanswerable(media), np.random.default_rng(number), DIALOGUE_TURNS
        )[:turns]
        for number, scene in enumerate(files.scenes)
    ]
    answers = ask_dialogues(sets.model, files, [[wording for _, wording in dialogue] for dialogue in questions])
    last = [dialogue[-1][0] for dialogue in questions]
    correct = [
        texts.is_correct(name, answer, scene, media)
        for name, (*_, answer), scene in zip(last, answers, files.scenes, strict=True)
    ]
    chances = {
        name: constant_answer_accuracy(
            name, [scene for other, scene in zip(last, files.scenes, strict=True) if other == name], media
        )
        for name in {*last}
    }
    return measure(correct, float(np.mean([chances[name] for name in last])))


def _make_measure(files: FileSet, question: str, **options: Any) -> MeasureFunction:
    """Make a measure of a question about a file set, with options of `_measure_answers`."""
    return lambda sets: _measure_answers(sets.model, sets(files), question, **options)


def _make_order_measure(files: FileSet, *questions: str) -> MeasureFunction:
    return lambda sets: _measure_order(sets.model, sets(files), *questions)


def _make_visual_measures() -> dict[str, MeasureFunction]:
    measures = {}
    for name in ("object", "colour", "size"):
        measures[name] = _make_measure(holdout_files.MOVING, name)
        measures[f"{name}_still"] = _make_measure(holdout_files.STILLS, name)
        measures[f"{name}_new_wording"] = _make_measure(holdout_files.MOVING, name, wording=NEW_WORDING)
    measures |= {"count": _make_measure(holdout_files.STILLS, "count"), "place": _measure_place}
    return measures | {
        name: _make_measure(holdout_files.TURNS, name, chance=CHANCE_OF_TWO) for name in ("first", "last")
    }


def _make_scale_measures(scale: float) -> dict[str, MeasureFunction]:
    """Make the measures of sounds and their order with audio vectors of a norm."""
    return {
        f"sound_only_times_{scale:g}": lambda sets: _measure_answers(
            sets.model, _scale_audio_vectors(sets(holdout_files.SOUNDS), scale), "hear"
        ),
        f"sound_order_times_{scale:g}": lambda sets: _measure_order(
            sets.model, _scale_audio_vectors(sets(holdout_files.TWO_SOUNDS), scale)
        ),
    }


def _with_noise(noise: float) -> FileSet:
    return dataclasses.replace(holdout_files.SOUNDS, name=f"noise {noise}", snr_db=noise)


# All measures by name. Claim 1: the direction of motion, with frames in order, shuffled and reversed. Then other
# properties of objects. Claim 2: sounds and their order, with audio vectors of several norms, and permuted. Then frames
# with audio; they match in half of the clips, so that each of them alone gives an accuracy of 0.5. Questions about
# absent media. The first and the tenth answer of dialogues. Audio with noise.
MEASURES: dict[str, MeasureFunction] = {
    "motion": _make_measure(holdout_files.MOVING, "motion"),
    "motion_new_wording": _make_measure(holdout_files.MOVING, "motion", wording=NEW_WORDING),
    "motion_of_two": lambda sets: _measure_direction(sets.model, sets(holdout_files.MOVING)),
    "motion_shuffled": lambda sets: _measure_direction(sets.model, _shuffle_frames(sets)),
    "motion_shuffled_answered": lambda sets: _measure_answers(
        sets.model, _shuffle_frames(sets), "motion", chance=CHANCE_OF_TWO
    ),
    "motion_reversed": lambda sets: _measure_answers(sets.model, _reverse_frames(sets), "motion"),
    "motion_reversed_opposite": lambda sets: _measure_answers(sets.model, _reverse_frames_and_answers(sets), "motion"),
    **_make_visual_measures(),
    "sound_only": _make_measure(holdout_files.SOUNDS, "hear"),
    "sound_order": _make_order_measure(holdout_files.TWO_SOUNDS),
    "sound_order_as_of_pictures": _make_order_measure(holdout_files.TWO_SOUNDS, "first", "last"),
    "sound_only_new_wording": _make_measure(holdout_files.SOUNDS, "hear", wording=NEW_WORDING),
    **{name: function for scale in SCALES for name, function in _make_scale_measures(scale).items()},
    "sound_only_unaligned": _measure_permuted_vectors,
    "sound_order_of_short": _make_order_measure(holdout_files.TWO_SHORT),
    "fit_with_both": _make_measure(holdout_files.BOTH, "fit"),
    "motion_with_both": _make_measure(holdout_files.BOTH, "motion"),
    "hear_with_both": _make_measure(holdout_files.BOTH, "hear", chance=CHANCE_OF_TWO),
    "object_with_both": _make_measure(holdout_files.BOTH, "object", chance=CHANCE_OF_TWO),
    "hear_nothing": _make_absence_measure(SILENT, ["hear"]),
    "hear_nothing_new_wording": _make_absence_measure(
        [holdout_files.STILLS, holdout_files.MOVING], ["hear"], NEW_WORDING
    ),
    "hear_nothing_despite_audio": _measure_false_silence,
    "see_nothing": _make_absence_measure([holdout_files.SOUNDS], ["object", "colour", "motion"]),
    "dialogue_first": lambda sets: _measure_dialogue(sets, 1),
    "dialogue_last": lambda sets: _measure_dialogue(sets, DIALOGUE_TURNS),
    **{f"sound_only_at_{noise:g}_db": _make_measure(_with_noise(noise), "hear") for noise in NOISES},
}


def measure_without_positions(model: Model, seed: int, clips: int, log: Callable[[str], None]) -> dict[str, Measure]:
    """Measure claim 1 with a model that was trained without frame positions."""
    moving = encode_files(model, holdout_files.MOVING, seed, clips, log)
    measures = {"motion_without_positions": _measure_direction(model, moving)}
    measures["motion_without_positions_answered"] = _measure_answers(model, moving, "motion", chance=CHANCE_OF_TWO)
    return measures | {
        f"{name}_without_positions": _measure_answers(model, moving, name) for name in ("object", "colour")
    }


def measure_random_audio_tower(model: Model, seed: int, clips: int, log: Callable[[str], None]) -> dict[str, Measure]:
    """Measure claim 2 with an untrained audio tower."""
    network = nnx.clone(model.network)
    network.imagebind.audio = audio_tower.ContrastiveAudioTower(rngs=nnx.Rngs(seed)).tower
    changed = dataclasses.replace(model, network=network)
    files = encode_files(changed, holdout_files.SOUNDS, seed, clips, log)
    return {"sound_only_random_tower": _measure_answers(changed, files, "hear")}


def format_measures(measures: dict[str, Measure]) -> str:
    """Format measures as a text table with one line for each."""
    width = max(map(len, measures))
    lines = [f"{'':{width}}  accuracy  95 % interval    chance     n"]
    for name, one in measures.items():
        interval = f"{one['low']:.3f} to {one['high']:.3f}"
        lines.append(f"{name:{width}}  {one['accuracy']:8.3f}  {interval}  {one['chance']:6.3f}  {one['n']:4}")
    return "\n".join(lines)
