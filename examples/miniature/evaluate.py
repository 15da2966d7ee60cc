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
from vllama_jax.errors import ConfigError
from vllama_jax.evaluate.answers import greedy_answers
from vllama_jax.miniature import hearing, texts, unseen
from vllama_jax.miniature.scene import Scene
from vllama_jax.miniature.unseen import FileSet, Shown, show
from vllama_jax.model import Model
from vllama_jax.nn.video_llama import splice
from vllama_jax.text import prompts
from vllama_jax.text.prompts import Media

TOKENS = 24  # of an answer at most
SCALES = (2.0, 5.0, 10.0, 20.0)  # norms of sound vectors, beside the model's own; published weights have the last
NOISES = (20.0, 10.0, 5.0, 0.0, -5.0)  # dB of signal to noise
PERMUTATIONS = 20
NEW_WORDING = 3  # the wording that no branch was trained on
OF_TWO = 0.5  # chance where all but what is asked leaves two answers

Measure = dict[str, float]  # accuracy, of n answers; chance; low and high of the accuracy's 95 % interval


def measure(right: Sequence[bool] | np.ndarray, chance: float) -> Measure:
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


def of_one_answer(question: str, scenes: Sequence[Scene]) -> float:
    """Chance: how often the answer that is right most often is, by one who looks at nothing."""
    right = collections.Counter(texts.key(question, texts.answer(question, scene)) for scene in scenes)
    return max(right.values()) / len(scenes)


def check_asked(seed: int, clips: int) -> None:
    """Raises ConfigError for a seed or a number of files that can be none."""
    if clips < 1 or seed < 0:
        raise ConfigError(f"--clips must be at least 1 and --seed at least 0, not {clips} and {seed}")


def evaluate(model: Model, seed: int, clips: int, say: Callable[[str], None] = lambda text: None) -> dict[str, Measure]:
    """All measures; `clips` files for each of the sets that they are about."""

    def see(files: FileSet) -> Shown:
        return show(model, files, seed, clips, say)

    moving = see(unseen.MOVING)
    found = _time(model, moving) | _pictures(model, moving, see(unseen.STILLS), see(unseen.TURNS))
    found |= _hearing(model, see(unseen.SOUNDS), see(unseen.TWO_SOUNDS))
    found["sound_order_of_short"] = _order(model, see(unseen.TWO_SHORT))
    found |= _together(model, see(unseen.BOTH))
    for noise in NOISES:
        noisy = see(dataclasses.replace(unseen.SOUNDS, name=f"noise {noise}", snr_db=noise))
        found[f"sound_only_at_{noise:g}_db"] = _asked(model, noisy, "hear")
    return found


def _time(model: Model, moving: Shown) -> dict[str, Measure]:
    """Claim 1: which way a thing moves, with its frames in order, shuffled, and reversed."""
    draw = np.random.default_rng(0)
    orders = np.stack([draw.permutation(moving.features.shape[1]) for _ in moving.scenes])
    shuffled = np.take_along_axis(moving.features, orders[..., None, None], axis=1)
    backwards = [_turned(scene) for scene in moving.scenes]
    backward = dataclasses.replace(moving, features=moving.features[:, ::-1])
    return {
        "motion": _asked(model, moving, "motion"),
        "motion_new_wording": _asked(model, moving, "motion", wording=NEW_WORDING),
        "motion_of_two": _of_two(model, moving),
        "motion_shuffled": _of_two(model, dataclasses.replace(moving, features=shuffled)),
        "motion_shuffled_answered": _asked(
            model, dataclasses.replace(moving, features=shuffled), "motion", chance=OF_TWO
        ),
        "motion_reversed": _asked(model, backward, "motion"),
        "motion_reversed_opposite": _asked(model, dataclasses.replace(backward, scenes=backwards), "motion"),
    }


def _of_two(model: Model, moving: Shown) -> Measure:
    """Whether a thing's way is likelier to the language model than the opposite one.

    Shuffled frames leave the axis of a motion visible, so a half is chance. They look like other motions too (a thing
    that vanishes, two in turn), so that free answers are of other kinds and tell little of direction.
    """
    question = texts.QUESTIONS["motion"][0]
    right = [texts.answer("motion", scene) for scene in moving.scenes]
    wrong = [texts.answer("motion", _turned(scene)) for scene in moving.scenes]
    likelihoods = [likelihood(model, moving, question, answers) for answers in (right, wrong)]
    return measure(likelihoods[0] > likelihoods[1], OF_TWO)


def _turned(scene: Scene) -> Scene:
    things = scene.shown[0]
    return Scene((dataclasses.replace(things, motion=texts.OPPOSITES[things.motion]),), scene.heard)


def _pictures(model: Model, moving: Shown, stills: Shown, turns: Shown) -> dict[str, Measure]:
    found = {}
    for name in ("object", "colour", "size"):
        found[name] = _asked(model, moving, name)
        found[f"{name}_still"] = _asked(model, stills, name)
        found[f"{name}_new_wording"] = _asked(model, moving, name, wording=NEW_WORDING)
    single = [number for number, scene in enumerate(stills.scenes) if scene.shown[0].number == 1]
    found["count"] = _asked(model, stills, "count")
    if single:  # not always among a few stills
        found["place"] = _asked(model, stills.some(single), "place")
    return found | {name: _asked(model, turns, name, chance=OF_TWO) for name in ("first", "last")}


def _hearing(model: Model, sounds: Shown, two: Shown) -> dict[str, Measure]:
    """Claim 2: what is heard, and in which order, at several scales of the sound vectors; and with wrong vectors."""
    found = {"sound_only": _asked(model, sounds, "hear"), "sound_order": _order(model, two)}
    found["sound_order_as_of_pictures"] = _order(model, two, "first", "last")
    found["sound_only_new_wording"] = _asked(model, sounds, "hear", wording=NEW_WORDING)
    for scale in SCALES:
        found[f"sound_only_times_{scale:g}"] = _asked(model, _scaled(sounds, scale), "hear")
        found[f"sound_order_times_{scale:g}"] = _order(model, _scaled(two, scale))
    right = []
    for number in range(PERMUTATIONS):
        order = np.random.default_rng(number).permutation(sounds.sounds.shape[-1])
        right.append(_answers_right(model, dataclasses.replace(sounds, sounds=sounds.sounds[..., order]), "hear"))
    found["sound_only_unaligned"] = measure(right, of_one_answer("hear", sounds.scenes))
    return found


def _scaled(shown: Shown, scale: float) -> Shown:
    """The same sounds with vectors of another norm."""
    norms = np.linalg.norm(shown.sounds, axis=-1, keepdims=True)
    return dataclasses.replace(shown, sounds=shown.sounds * (np.float32(scale) / norms))


def _order(model: Model, two: Shown, first: str = "hear_first", last: str = "hear_last") -> Measure:
    """Whether the sound named first is the first of the two, and the last the last; other kinds are wrong answers."""
    right = [_answers_right(model, two, name) for name in (first, last)]
    return measure(np.transpose(right), OF_TWO)


def _together(model: Model, both: Shown) -> dict[str, Measure]:
    """Sound and picture at once: agreeing in half of the clips, so that a model with one sense is right in half."""
    found = {f"{name}_with_both": _asked(model, both, name) for name in ("fit", "motion")}
    return found | {f"{name}_with_both": _asked(model, both, name, chance=OF_TWO) for name in ("hear", "object")}


def _asked(model: Model, shown: Shown, name: str, *, wording: int = 0, chance: float | None = None) -> Measure:
    """A question about what is shown: pictures, sound, or both, as the files of its set are.

    chance: of the answer that is right most often, unless given.
    """
    right = _answers_right(model, shown, name, wording)
    return measure(right, of_one_answer(name, shown.scenes) if chance is None else chance)


def _answers_right(model: Model, shown: Shown, name: str, wording: int = 0) -> list[bool]:
    answers = ask(model, shown, texts.QUESTIONS[name][wording])
    return [texts.is_right(name, said, scene) for said, scene in zip(answers, shown.scenes, strict=True)]


def ask(model: Model, shown: Shown, question: str) -> list[str]:
    """Answers to one question about every file, in batches."""
    return [answer for batch in shown.batches() for answer in _ask_batch(model, batch, question)]


def _ask_batch(model: Model, shown: Shown, question: str) -> list[str]:
    template = prompts.find_template(model.config.template)
    return greedy_answers(model, template, _prompts(model, shown, question), TOKENS, len(shown.scenes))


def _prompts(
    model: Model, shown: Shown, question: str, answers: Sequence[str] | None = None
) -> list[generate.EmbeddedPrompt]:
    """The question about each file as a chat asks it, and perhaps its answer."""
    parts, found = [], []
    if shown.sounds is not None:
        parts.append(np.asarray(_tokens("audio")(model.network, shown.sounds)))
    if shown.features is not None:
        parts.append(np.asarray(_tokens("video")(model.network, shown.features)))
    for row, media in enumerate(shown.media):
        conversation = prompts.start_conversation(model.config.template, model.config.has_audio)
        conversation = conversation.add(_as_shown(media, shown)).ask(question)
        conversation = conversation if answers is None else conversation.answer(answers[row])
        encoded = prompts.encode_conversation(conversation, model.tokenizer, [part.shape[1] for part in parts])
        found.append(
            generate.EmbeddedPrompt(encoded.ids, encoded.is_media, np.concatenate([part[row] for part in parts]))
        )
    return found


def _as_shown(media: Media, shown: Shown) -> Media:
    """What is said of a file in the prompt, where only its sound or only its pictures are given."""
    if shown.features is None:
        return Media("audio")
    return dataclasses.replace(media, sound=shown.sounds is not None)


def likelihood(model: Model, shown: Shown, question: str, answers: Sequence[str]) -> np.ndarray:
    """The log probability of an answer to the question about each file: float [n]."""
    found, rest = [], list(answers)
    for batch in shown.batches():
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
def _log_probabilities(network: Any, ids: jax.Array, is_media: jax.Array, media: jax.Array, spans: jax.Array):
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


def without_positions(model: Model, seed: int, clips: int, say: Callable[[str], None]) -> dict[str, Measure]:
    """The first claim's measures of a model that never had frame positions."""
    moving = show(model, unseen.MOVING, seed, clips, say)
    found = {"motion_without_positions": _of_two(model, moving)}
    found["motion_without_positions_answered"] = _asked(model, moving, "motion", chance=OF_TWO)
    return found | {f"{name}_without_positions": _asked(model, moving, name) for name in ("object", "colour")}


def random_hearing(model: Model, seed: int, clips: int, say: Callable[[str], None]) -> dict[str, Measure]:
    """The second claim's measure with an audio tower that was never trained."""
    network = nnx.clone(model.network)
    network.imagebind.audio = hearing.Hearing(rngs=nnx.Rngs(seed)).tower
    deaf = dataclasses.replace(model, network=network)
    sounds = show(deaf, unseen.SOUNDS, seed, clips, say)
    return {"sound_only_random_tower": _asked(deaf, sounds, "hear")}


def as_table(measures: dict[str, Measure]) -> str:
    """A line for each measure."""
    width = max(map(len, measures))
    lines = [f"{'':{width}}  accuracy  95 % interval    chance     n"]
    for name, one in measures.items():
        interval = f"{one['low']:.3f} to {one['high']:.3f}"
        lines.append(f"{name:{width}}  {one['accuracy']:8.3f}  {interval}  {one['chance']:6.3f}  {one['n']:4}")
    return "\n".join(lines)
