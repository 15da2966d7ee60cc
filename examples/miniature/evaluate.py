"""What a miniature knows, measured on clips never seen before, of combinations never trained on.

Every measure is a question about a set of files; answers are greedy. Clips are written as mp4 and stills as JPEG, and
read as a chat reads them; sounds are under white noise at 15 dB unless a measure says otherwise. What varies between
measures (the order of frames, the scale or the dimensions of sound vectors) varies between the frozen encoders and the
branches' Q-Formers.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vllama_jax import generate
from vllama_jax.errors import ConfigError, suggest_name
from vllama_jax.evaluate.answers import generate_greedily
from vllama_jax.miniature import audio_tower, holdout_files, texts
from vllama_jax.miniature.holdout_files import EncodedFiles, FileSet, encode_files
from vllama_jax.miniature.scene import Scene
from vllama_jax.model import Model
from vllama_jax.nn.video_llama import VideoLlama, splice
from vllama_jax.text import prompts
from vllama_jax.text.prompts import Media
from vllama_jax.text.templates import find_template

TOKENS = 24  # of an answer at most
SCALES = (2.0, 5.0, 10.0, 20.0)  # norms of sound vectors, beside the model's own; published weights have the last
NOISES = (20.0, 10.0, 5.0, 0.0, -5.0)  # dB of signal to noise
PERMUTATIONS = 20
NEW_WORDING = 3  # the wording that no branch was trained on
OF_TWO = 0.5  # chance where all but what is asked leaves two answers

Measure = dict[str, float]  # accuracy, of n answers; chance; low and high of the accuracy's 95 % interval


def measure(right: Sequence[bool] | Sequence[Sequence[bool]] | np.ndarray, chance: float) -> Measure:
    """Accuracy with Wilson's interval, of bool [n], or [groups, n] where the answers of a group depend on each other.

    Dependent answers count as the number of independent ones whose share would vary as the groups' shares do.
    """
    groups = np.asarray(right, float).reshape(len(right), -1)
    share, spread = groups.mean(), groups.mean(axis=1).var() / len(groups)
    n = min(share * (1 - share) / spread, groups.size) if spread else groups.size
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    figures = {"accuracy": share, "n": groups.size, "chance": chance}
    figures |= {"low": max(middle - reach, 0), "high": min(middle + reach, 1)}
    return {name: round(value, 4) for name, value in figures.items()}


def constant_answer_accuracy(question: str, scenes: Sequence[Scene]) -> float:
    """Chance: how often the answer that is right most often is, by one who looks at nothing."""
    right = collections.Counter(texts.answer_key(question, texts.answer(question, scene)) for scene in scenes)
    return max(right.values()) / len(scenes)


def check_arguments(seed: int, clips: int, measures: Sequence[str] = ()) -> None:
    """Raise ConfigError for a seed or a number of files that can be none, and for a measure that there is not."""
    if clips < 1 or seed < 0:
        raise ConfigError(f"--clips must be at least 1 and --seed at least 0, not {clips} and {seed}")
    for name in measures:
        if name not in MEASURES:
            advice = f"{suggest_name(name, MEASURES)} There are {', '.join(MEASURES)}".lstrip()
            raise ConfigError(f"--measures {name}: no such measure; {advice}")


class FileSets:
    """The sets of files that measures of a model are about: each is rendered and encoded when it is first asked for."""

    def __init__(self, model: Model, seed: int, clips: int, log: Callable[[str], None]):
        self.model = model
        self._show = functools.cache(lambda files: encode_files(model, files, seed, clips, log))

    def __call__(self, files: FileSet) -> EncodedFiles:
        return self._show(files)


def evaluate(
    model: Model,
    seed: int,
    clips: int,
    log: Callable[[str], None] = lambda text: None,
    measures: Sequence[str] = (),
) -> dict[str, Measure]:
    """Measure a model on clips that are rendered now.

    Args:
        model: A miniature.
        seed: Of the clips.
        clips: How many files are in each set that a measure is about.
        say: Called with lines on the progress.
        measures: Names of MEASURES; all unless given. Only the sets that these are about are rendered.

    Raises:
        ConfigError: A measure, the seed or the number of clips is none.
    """
    check_arguments(seed, clips, measures)
    sets = FileSets(model, seed, clips, log)
    found = {name: measuring(sets) for name, measuring in MEASURES.items() if name in measures or not measures}
    return {name: measured for name, measured in found.items() if measured is not None}


def _of_two(model: Model, moving: EncodedFiles) -> Measure:
    """Whether a thing's way is likelier to the language model than the opposite one.

    Shuffled frames leave the axis of a motion visible, so a half is chance. They look like other motions too (a thing
    that vanishes, two in turn), so that free answers are of other kinds and tell little of direction.
    """
    question = texts.QUESTIONS["motion"][0]
    right = [texts.answer("motion", scene) for scene in moving.scenes]
    wrong = [texts.answer("motion", _turned(scene)) for scene in moving.scenes]
    likelihoods = [answer_log_probabilities(model, moving, question, answers) for answers in (right, wrong)]
    return measure(likelihoods[0] > likelihoods[1], OF_TWO)


def _turned(scene: Scene) -> Scene:
    group = scene.objects[0]
    return Scene((dataclasses.replace(group, motion=texts.OPPOSITES[group.motion]),), scene.sounds)


def _shuffled(sets: FileSets) -> EncodedFiles:
    moving, rng = sets(holdout_files.MOVING), np.random.default_rng(0)
    features = moving.require_features()
    orders = np.stack([rng.permutation(features.shape[1]) for _ in moving.scenes])
    return dataclasses.replace(moving, features=np.take_along_axis(features, orders[..., None, None], axis=1))


def _backward(sets: FileSets) -> EncodedFiles:
    moving = sets(holdout_files.MOVING)
    return dataclasses.replace(moving, features=moving.require_features()[:, ::-1])


def _turned_backward(sets: FileSets) -> EncodedFiles:
    """Reversed frames, of which the opposite motion is the right answer."""
    backward = _backward(sets)
    return dataclasses.replace(backward, scenes=[_turned(scene) for scene in backward.scenes])


def _place(sets: FileSets) -> Measure | None:
    """Where a thing is, in stills of one thing; None where there are none, as among a few stills."""
    stills = sets(holdout_files.STILLS)
    single = [number for number, scene in enumerate(stills.scenes) if scene.objects[0].number == 1]
    return _measure_answers(sets.model, stills.select(single), "place") if single else None


def _unaligned(sets: FileSets) -> Measure:
    """What is heard, of sound vectors whose dimensions are permuted."""
    audio_vectors, right = sets(holdout_files.SOUNDS), []
    vectors = audio_vectors.require_audio_vectors()
    for number in range(PERMUTATIONS):
        order = np.random.default_rng(number).permutation(vectors.shape[-1])
        right.append(
            _answers_right(sets.model, dataclasses.replace(audio_vectors, audio_vectors=vectors[..., order]), "hear")
        )
    return measure(right, constant_answer_accuracy("hear", audio_vectors.scenes))


def _scaled(files: EncodedFiles, scale: float) -> EncodedFiles:
    """The same sounds with vectors of another norm."""
    vectors = files.require_audio_vectors()
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return dataclasses.replace(files, audio_vectors=vectors * (np.float32(scale) / norms))


def _order(model: Model, two: EncodedFiles, first: str = "hear_first", last: str = "hear_last") -> Measure:
    """Whether the sound named first is the first of the two, and the last the last; other kinds are wrong answers."""
    right = [_answers_right(model, two, name) for name in (first, last)]
    return measure(np.transpose(right), OF_TWO)


def _measure_answers(
    model: Model, files: EncodedFiles, name: str, *, wording: int = 0, chance: float | None = None
) -> Measure:
    """A question about what is shown: pictures, sound, or both, as the files of its set are.

    chance: of the answer that is right most often, unless given.
    """
    right = _answers_right(model, files, name, wording)
    return measure(right, constant_answer_accuracy(name, files.scenes) if chance is None else chance)


def _answers_right(model: Model, files: EncodedFiles, name: str, wording: int = 0) -> list[bool]:
    answers = ask(model, files, texts.QUESTIONS[name][wording])
    return [texts.is_correct(name, said, scene) for said, scene in zip(answers, files.scenes, strict=True)]


def ask(model: Model, files: EncodedFiles, question: str) -> list[str]:
    """Answers to one question about every file, in batches."""
    return [answer for batch in files.batches() for answer in _ask_batch(model, batch, question)]


def _ask_batch(model: Model, files: EncodedFiles, question: str) -> list[str]:
    template = find_template(model.config.template)
    return generate_greedily(model, template, _prompts(model, files, question), TOKENS, len(files.scenes))


def _prompts(
    model: Model, files: EncodedFiles, question: str, answers: Sequence[str] | None = None
) -> list[generate.EmbeddedPrompt]:
    """The question about each file as a chat asks it, and perhaps its answer."""
    parts, found = [], []
    if files.audio_vectors is not None:
        parts.append(np.asarray(_tokens("audio")(model.network, files.audio_vectors)))
    if files.features is not None:
        parts.append(np.asarray(_tokens("video")(model.network, files.features)))
    for row, media in enumerate(files.media):
        conversation = prompts.start_conversation(model.config.template, model.config.has_audio)
        conversation = conversation.add(_as_shown(media, files)).ask(question)
        conversation = conversation if answers is None else conversation.answer(answers[row])
        encoded = prompts.encode_conversation(conversation, model.tokenizer, [part.shape[1] for part in parts])
        found.append(
            generate.EmbeddedPrompt(encoded.ids, encoded.is_media, np.concatenate([part[row] for part in parts]))
        )
    return found


def _as_shown(media: Media, files: EncodedFiles) -> Media:
    """What is said of a file in the prompt, where only its sound or only its pictures are given."""
    if files.features is None:
        return Media("audio")
    return dataclasses.replace(media, with_audio=files.audio_vectors is not None)


def answer_log_probabilities(model: Model, files: EncodedFiles, question: str, answers: Sequence[str]) -> np.ndarray:
    """The log probability of an answer to the question about each file: float [n]."""
    found, rest = [], list(answers)
    for batch in files.batches():
        said, rest = rest[: len(batch.scenes)], rest[len(batch.scenes) :]
        asked, given = _prompts(model, batch, question), _prompts(model, batch, question, said)
        length = generate.padded_prompt_length(max(len(prompt.ids) for prompt in given))
        ids, is_media = (np.stack([np.pad(x, (0, length - len(x))) for x in parts]) for parts in (
            [prompt.ids for prompt in given], [prompt.is_media for prompt in given]
        ))  # fmt: skip
        spans = np.array([(len(prompt.ids), len(whole.ids)) for prompt, whole in zip(asked, given, strict=True)])
        media = np.stack([prompt.media for prompt in given])
        found.append(np.asarray(_log_probabilities(model.network, ids, is_media, media, spans)))
    return np.concatenate(found)


@jax.jit
def _log_probabilities(
    network: VideoLlama, ids: jax.Array, is_media: jax.Array, media: jax.Array, spans: jax.Array
) -> jax.Array:
    """Summed over the tokens from the first of each span up to its last."""
    places = jnp.arange(ids.shape[1])
    x = splice(network.embed(ids), is_media, media)
    logits = network(x, places < spans[:, 1:])
    each = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=2)[..., 0]
    counted = (places[1:] >= spans[:, :1]) & (places[1:] < spans[:, 1:])
    return jnp.sum(each * counted, axis=1)


@functools.cache
def _tokens(sense: str) -> Any:
    """What the branch of a sense makes of features: tokens of the language model."""
    if sense == "audio":
        return jax.jit(lambda network, vectors: network.audio_tokens(vectors))
    return jax.jit(lambda network, features: network.video_tokens(features))


MeasureFunction = Callable[[FileSets], Measure | None]


def _answers(files: FileSet, question: str, **options: Any) -> MeasureFunction:
    """The measure of the answers to a question about a set of files; options as of `_asked`."""
    return lambda sets: _measure_answers(sets.model, sets(files), question, **options)


def _order_in(files: FileSet, *questions: str) -> MeasureFunction:
    return lambda sets: _order(sets.model, sets(files), *questions)


def _picture_measures() -> dict[str, MeasureFunction]:
    found = {}
    for name in ("object", "colour", "size"):
        found[name] = _answers(holdout_files.MOVING, name)
        found[f"{name}_still"] = _answers(holdout_files.STILLS, name)
        found[f"{name}_new_wording"] = _answers(holdout_files.MOVING, name, wording=NEW_WORDING)
    found |= {"count": _answers(holdout_files.STILLS, "count"), "place": _place}
    return found | {name: _answers(holdout_files.TURNS, name, chance=OF_TWO) for name in ("first", "last")}


def _scaled_measures(scale: float) -> dict[str, MeasureFunction]:
    """Sounds and their order at another norm of the sound vectors."""
    return {
        f"sound_only_times_{scale:g}": lambda sets: _measure_answers(
            sets.model, _scaled(sets(holdout_files.SOUNDS), scale), "hear"
        ),
        f"sound_order_times_{scale:g}": lambda sets: _order(sets.model, _scaled(sets(holdout_files.TWO_SOUNDS), scale)),
    }


def _noisy(noise: float) -> FileSet:
    return dataclasses.replace(holdout_files.SOUNDS, name=f"noise {noise}", snr_db=noise)


# Every measure by its name: claim 1, which way a thing moves, with its frames in order, shuffled and reversed; other
# things that are seen; claim 2, what is heard and in which order, at several scales, and of permuted vectors; frames
# and audio at once, which agree in half of the clips, so that one of them alone is right in half; audio under noise.
MEASURES: dict[str, MeasureFunction] = {
    "motion": _answers(holdout_files.MOVING, "motion"),
    "motion_new_wording": _answers(holdout_files.MOVING, "motion", wording=NEW_WORDING),
    "motion_of_two": lambda sets: _of_two(sets.model, sets(holdout_files.MOVING)),
    "motion_shuffled": lambda sets: _of_two(sets.model, _shuffled(sets)),
    "motion_shuffled_answered": lambda sets: _measure_answers(sets.model, _shuffled(sets), "motion", chance=OF_TWO),
    "motion_reversed": lambda sets: _measure_answers(sets.model, _backward(sets), "motion"),
    "motion_reversed_opposite": lambda sets: _measure_answers(sets.model, _turned_backward(sets), "motion"),
    **_picture_measures(),
    "sound_only": _answers(holdout_files.SOUNDS, "hear"),
    "sound_order": _order_in(holdout_files.TWO_SOUNDS),
    "sound_order_as_of_pictures": _order_in(holdout_files.TWO_SOUNDS, "first", "last"),
    "sound_only_new_wording": _answers(holdout_files.SOUNDS, "hear", wording=NEW_WORDING),
    **{name: measuring for scale in SCALES for name, measuring in _scaled_measures(scale).items()},
    "sound_only_unaligned": _unaligned,
    "sound_order_of_short": _order_in(holdout_files.TWO_SHORT),
    "fit_with_both": _answers(holdout_files.BOTH, "fit"),
    "motion_with_both": _answers(holdout_files.BOTH, "motion"),
    "hear_with_both": _answers(holdout_files.BOTH, "hear", chance=OF_TWO),
    "object_with_both": _answers(holdout_files.BOTH, "object", chance=OF_TWO),
    **{f"sound_only_at_{noise:g}_db": _answers(_noisy(noise), "hear") for noise in NOISES},
}


def measure_without_positions(model: Model, seed: int, clips: int, log: Callable[[str], None]) -> dict[str, Measure]:
    """The first claim's measures of a model that never had frame positions."""
    moving = encode_files(model, holdout_files.MOVING, seed, clips, log)
    found = {"motion_without_positions": _of_two(model, moving)}
    found["motion_without_positions_answered"] = _measure_answers(model, moving, "motion", chance=OF_TWO)
    return found | {f"{name}_without_positions": _measure_answers(model, moving, name) for name in ("object", "colour")}


def measure_random_audio_tower(model: Model, seed: int, clips: int, log: Callable[[str], None]) -> dict[str, Measure]:
    """The second claim's measure with an audio tower that was never trained."""
    network = nnx.clone(model.network)
    network.imagebind.audio = audio_tower.ContrastiveAudioTower(rngs=nnx.Rngs(seed)).tower
    deaf = dataclasses.replace(model, network=network)
    audio_vectors = encode_files(deaf, holdout_files.SOUNDS, seed, clips, log)
    return {"sound_only_random_tower": _measure_answers(deaf, audio_vectors, "hear")}


def format_measures(measures: dict[str, Measure]) -> str:
    """A line for each measure."""
    width = max(map(len, measures))
    lines = [f"{'':{width}}  accuracy  95 % interval    chance     n"]
    for name, one in measures.items():
        interval = f"{one['low']:.3f} to {one['high']:.3f}"
        lines.append(f"{name:{width}}  {one['accuracy']:8.3f}  {interval}  {one['chance']:6.3f}  {one['n']:4}")
    return "\n".join(lines)
