"""Train the miniature's tokenizer and language model, on text about the world only.

The texts are the prompts of Video-LLaMA, with a *description* in words in place of the media tokens: the words of a
caption, or the kinds that are heard, in random order, incomplete or repeated. All that the model knows about sounds
comes from this text. Questions about absent media are answered with a sentence that says so.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vllama_jax.config import LlamaConfig
from vllama_jax.miniature import render, texts
from vllama_jax.miniature.fit import fit
from vllama_jax.miniature.scene import (
    DIRECTIONS,
    KINDS,
    MOTIONS,
    PLACES,
    Scene,
    draw_motion,
    draw_objects,
    draw_scene,
    motion_of,
    randomize_sound,
)
from vllama_jax.nn.llama import Llama
from vllama_jax.text import prompts
from vllama_jax.text.prompts import Media
from vllama_jax.text.templates import find_conversation_template
from vllama_jax.text.tokenizer import Tokenizer, load_tokenizer
from vllama_jax.text.training import label_conversation

DescribedText = tuple[np.ndarray, np.ndarray]  # token ids, int [n], and which of them are of a description, bool [n]
DrawText = Callable[[Tokenizer, np.random.Generator], DescribedText]
DrawBatch = Callable[[np.random.Generator], dict[str, np.ndarray]]

VOCAB_SIZE = 704
# Rows of a batch and tokens of a row, which has concatenated texts, the last of them truncated. Chats have up to 209
# tokens, almost all of them at most 192.
COMPARISONS_SHAPE, TEXTS_SHAPE = (16, 128), (21, 192)
TEMPLATE = "vicuna"
# Probabilities of the layouts: a caption, comparisons, a dialogue of training, and chats about video or an image, about
# audio, about both, and without media. In chats about one of the two, ABSENT_PROBABILITY of texts.py applies.
LAYOUTS = {
    "caption": 0.08, "comparisons": 0.1, "training": 0.2, "video": 0.2, "audio": 0.2, "both": 0.2, "nothing": 0.02
}  # fmt: skip
SHORT_TURNS, LONG_TURNS = (2, 5), (6, 10)  # of a chat, which has fewer in the first case if fewer questions apply
LONG_PROBABILITY = 0.3
MAX_NOISE = 1.5  # standard deviation of the noise on descriptions, relative to the RMS of the word embeddings
MEASURED_QUESTIONS = ("object", "colour", "size", "motion", "hear")  # the last is about absent audio
WORLD_SECONDS = tuple((render.SAMPLED_FRAMES / render.FPS).tolist())  # timestamps of a clip's sampled frames

CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    width=128,
    depth=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    mlp_dim=352,
    norm_eps=1e-6,
    max_length=1024,
)


def list_prompt_sentences() -> list[str]:
    """Return the texts that all prompts share. Each becomes one token, so that prompts have a third of the length."""
    audio = prompts.format_media(Media("audio"))
    both = prompts.format_media(Media("video", with_audio=True))
    tags = ["<Video>", "</Video>", "<Image>", "</Image>"]
    words = ["###", "Human:", "Assistant:", *tags, "\n", prompts.DEFAULT_SYSTEM]
    sentences = [
        text.removesuffix("<Video>").removeprefix("</Video>") for text in (*audio, *both) if isinstance(text, str)
    ]
    sentences.append(prompts.format_timestamps(WORLD_SECONDS))
    return list(dict.fromkeys([*words, *(text.strip(" ") for text in sentences)]))


def train_tokenizer(directory: Path, seed: int) -> Tokenizer:
    """Train a SentencePiece model on texts about the world, with LLaMA's special tokens and byte fallback.

    Args:
        directory: Where tokenizer.model is written.
        seed: The seed of the texts.

    Returns:
        The tokenizer.
    """
    import sentencepiece

    rng = np.random.default_rng([seed, 0])
    lines = [line for _ in range(4000) for line in _draw_plain_texts(randomize_sound(draw_scene(rng), rng), rng)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[text.replace(" ", "▁") for text in list_prompt_sentences()],
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    return load_tokenizer(directory)


def train_language_model(
    tokenizer: Tokenizer, *, comparison_steps: int, steps: int, seed: int, log: Callable[[str], None]
) -> Llama:
    """Train a language model on new texts at every step: first on comparisons alone, then on all texts.

    Noise is added to the embeddings of descriptions, with another strength for each row, because media tokens resemble
    the embeddings of words but never equal them.

    Args:
        tokenizer: The tokenizer.
        comparison_steps: The number of steps on comparisons alone.
        steps: The number of steps on all texts.
        seed: The seed of the weights and of the texts.
        log: Called with progress messages.

    Returns:
        The trained model.
    """

    def batches(draw_text: DrawText, shape: tuple[int, int]) -> DrawBatch:
        rows, length = shape

        def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
            ids, is_description = map(
                np.stack, zip(*(_pack_row(tokenizer, rng, draw_text, length) for _ in range(rows)), strict=True)
            )
            return {"ids": ids, "is_description": is_description, "seed": np.array(rng.integers(2**31))}

        return batch

    def loss(llama: Llama, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        ids, words = batch["ids"], llama.embed(batch["ids"])
        noise = _sample_noise(llama, words.shape, jax.random.key(batch["seed"]))
        x = words + batch["is_description"][..., None] * noise
        logits = llama.logits(llama(x, jnp.ones(ids.shape, bool), "none"))[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return jnp.mean(losses), {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == ids[:, 1:])}

    def train(llama: Llama, batch: DrawBatch, steps: int, name: str) -> Llama:
        return fit(llama, loss, batch, steps=steps, learning_rate=2e-3, seed=seed, name=name, log=log)

    llama = Llama(CONFIG, rngs=nnx.Rngs(seed))
    llama = train(llama, batches(draw_comparisons, COMPARISONS_SHAPE), comparison_steps, "comparisons")
    return train(llama, batches(draw_text, TEXTS_SHAPE), steps, "language model")


def measure_answers(llama: Llama, tokenizer: Tokenizer, seed: int, scenes: int = 200) -> dict[str, float]:
    """Measure the answers about moving objects of held-out combinations, which are described in words without noise.

    Args:
        llama: The language model.
        tokenizer: The tokenizer.
        seed: The seed of the scenes.
        scenes: The number of scenes.

    Returns:
        For each of MEASURED_QUESTIONS, the share of the scenes for which each token of the reference answer is the most
        probable one after those before it.
    """
    predict = jax.jit(
        lambda llama, ids: jnp.argmax(llama.logits(llama(llama.embed(ids), jnp.ones(ids.shape, bool), "none")), axis=-1)
    )
    media = Media("video", timestamps=WORLD_SECONDS)
    accuracies = {}
    for name in MEASURED_QUESTIONS:
        ids, is_answer = np.zeros((scenes, TEXTS_SHAPE[1]), np.int32), np.zeros((scenes, TEXTS_SHAPE[1]), bool)
        rng = np.random.default_rng([seed, 1])
        for number in range(scenes):
            scene = draw_scene(rng, DIRECTIONS[number % len(DIRECTIONS)], "test")
            description = _encode(tokenizer, describe_objects(scene, rng))
            asked = prompts.start_conversation(TEMPLATE, audio_branch=True).add(media).ask(texts.QUESTIONS[name][0])
            answered = asked.answer(texts.answer(name, scene, media.placeholders))
            prompt, text = (
                prompts.encode_conversation(one, tokenizer, [len(description)]) for one in (asked, answered)
            )
            ids[number, : len(text.ids)] = _fill_placeholders(text.ids, text.is_media, description)
            is_answer[number, len(prompt.ids) : len(text.ids)] = True
        is_right = (np.asarray(predict(llama, ids))[:, :-1] == ids[:, 1:]) | ~is_answer[:, 1:]
        accuracies[name] = float(is_right.all(axis=1).mean())
    return accuracies


def _sample_noise(llama: Llama, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """Sample Gaussian noise, with a strength for each row that is uniform between 0 and MAX_NOISE."""
    strength_key, noise_key = jax.random.split(key)
    words = jax.lax.stop_gradient(llama.embedding[...])
    strength = jnp.sqrt(jnp.mean(words**2)) * jax.random.uniform(strength_key, (shape[0], 1, 1), maxval=MAX_NOISE)
    return strength * jax.random.normal(noise_key, shape)


def _pack_row(tokenizer: Tokenizer, rng: np.random.Generator, draw_text: DrawText, length: int) -> DescribedText:
    """Concatenate texts, and truncate them to a number of tokens."""
    drawn: list[DescribedText] = []
    while sum(len(ids) for ids, _ in drawn) < length:
        drawn.append(draw_text(tokenizer, rng))
    ids, is_description = (np.concatenate(arrays)[:length] for arrays in zip(*drawn, strict=True))
    return ids, is_description


def draw_comparisons(tokenizer: Tokenizer, rng: np.random.Generator) -> DescribedText:
    """Draw six answers to the question whether a sound matches an image.

    All kinds of one text differ, except within an answer that is yes. The model then has to find a repeated kind.
    """
    kinds = rng.permutation(list(KINDS))[:12].reshape(6, 2)
    answers = [texts.compare_kinds(kind, kind if rng.random() < 0.5 else other) for kind, other in kinds]
    ids = _encode(tokenizer, "".join(f"{answer}\n" for answer in answers), bos=True)
    return ids, np.zeros(len(ids), bool)


def draw_text(tokenizer: Tokenizer, rng: np.random.Generator) -> DescribedText:
    """Draw a text of one of the LAYOUTS."""
    layout = str(rng.choice(list(LAYOUTS), p=list(LAYOUTS.values())))
    if layout == "comparisons":
        return draw_comparisons(tokenizer, rng)
    scene = draw_scene(rng, "in turn" if rng.random() < (0.4 if layout == "audio" else 0.1) else None)
    if layout == "caption":
        description = _encode(tokenizer, f"{describe_objects(scene, rng)}\n", True)[:-1]
        ids = np.concatenate([description, _encode(tokenizer, f"{texts.caption(scene)}\n")])
        is_description = np.arange(len(ids)) < len(description)
        is_description[0] = False  # BOS
        return ids, is_description
    if layout == "training":
        return _draw_training_text(tokenizer, scene, rng)
    return _draw_chat_text(tokenizer, randomize_sound(scene, rng) if layout == "both" else scene, layout, rng)


def _draw_training_text(tokenizer: Tokenizer, scene: Scene, rng: np.random.Generator) -> DescribedText:
    """Draw a dialogue in the layout of stage 2."""
    description = _encode(tokenizer, describe_objects(scene, rng))
    is_video = motion_of(scene) != "rests" or rng.random() < 0.3
    media = Media("video", timestamps=_draw_timestamps(rng)) if is_video else Media("image")
    turns = texts.draw_dialogue(scene, rng, int(rng.integers(2, 6)), wordings=4)
    if media.kind == "image":
        turns[0] = (f" {turns[0][0]}", turns[0][1])
    encoded = label_conversation(
        tokenizer, find_conversation_template(TEMPLATE), turns, media, 0, len(description), TEXTS_SHAPE[1]
    )
    return _fill_placeholders(encoded.ids, encoded.is_media, description), encoded.is_media


def _draw_chat_text(tokenizer: Tokenizer, scene: Scene, layout: str, rng: np.random.Generator) -> DescribedText:
    """Draw a dialogue in the layout of a chat, also with questions about media that are absent."""
    descriptions, names, two_sounds = [], [], len(scene.sounds) == 2
    if layout in ("audio", "both"):
        descriptions.append(_encode(tokenizer, describe_sounds(scene.sounds, rng)))
        names += ["hear_first", "hear_last"] if two_sounds else ["hear"]
    if layout in ("video", "both"):
        descriptions.append(_encode(tokenizer, describe_objects(scene, rng)))
        names += texts.list_questions(scene)
    if layout == "audio":
        names += ["first", "last"] if two_sounds else []
    elif layout == "both":
        names += ["fit", "fit"] if len(scene.objects) == 1 else []
    media = _draw_media(scene, layout, rng)
    kinds = media.placeholders if media else ()
    unanswerable = texts.list_unanswerable(kinds)
    is_long = rng.random() < LONG_PROBABILITY
    low, high = LONG_TURNS if is_long else SHORT_TURNS
    turns = int(rng.integers(low, high + 1))
    if media and not is_long:
        turns = min(turns, len(names))
    conversation = prompts.start_conversation(TEMPLATE, audio_branch=True)
    conversation = conversation.add(media) if media else conversation
    for name, wording in texts.draw_questions(names, unanswerable, rng, turns):
        conversation = conversation.ask(wording).answer(texts.answer(name, scene, kinds))
    encoded = prompts.encode_conversation(conversation, tokenizer, [len(description) for description in descriptions])
    ids = _fill_placeholders(encoded.ids, encoded.is_media, np.concatenate([np.zeros(0, np.int32), *descriptions]))
    return np.append(ids, tokenizer.encode("###", special=False)[-1]), np.append(encoded.is_media, False)


def _draw_media(scene: Scene, layout: str, rng: np.random.Generator) -> Media | None:
    """Return the file that a chat is about, or None. Of objects at rest, most files without audio are images."""
    if layout == "nothing":
        return None
    if layout == "audio":
        return Media("audio")
    if layout == "both":
        return Media("video", with_audio=True)
    is_image = motion_of(scene) == "rests" and rng.random() < 0.7
    return Media("image") if is_image else Media("video", timestamps=_draw_timestamps(rng))


def describe_objects(scene: Scene, rng: np.random.Generator) -> str:
    """Draw the description of an image or a clip: its caption, or the words of it shuffled and repeated."""
    if rng.random() < 0.3:
        return texts.caption(scene)
    if len(scene.objects) == 1:
        return _shuffle_words(texts.caption(scene).split(), rng)
    first, then = (_shuffle_words(texts.noun_phrase(group).split(), rng) for group in scene.objects)
    return f"first {first} then {then}"


def describe_sounds(kinds: tuple[str, ...], rng: np.random.Generator) -> str:
    """Draw the description of sounds.

    Half of them are descriptions of images with a random color and motion, as the audio branch is trained on images.
    """
    if rng.random() < 0.5:
        motion = draw_motion(rng, MOTIONS[:-1]) if len(kinds) == 1 else "in turn"
        return describe_objects(Scene(tuple(draw_objects(rng, motion, "train", kind=kind) for kind in kinds)), rng)
    as_sentence = rng.random() < 0.5
    sounds = [f"a {kind} {KINDS[kind]}" if as_sentence else _shuffle_words([kind], rng) for kind in kinds]
    return sounds[0] if len(sounds) == 1 else f"first {sounds[0]} then {sounds[1]}"


def _shuffle_words(words: list[str], rng: np.random.Generator) -> str:
    """Shuffle words and repeat each up to three times. The words of a place stay together."""
    text = " ".join(words)
    place = next((place for place in sorted(PLACES, key=len, reverse=True) if place in text), "")
    units = [*text.replace(place, "").split(), *([place] if place else [])]
    units = [unit for unit in units if unit not in ("a", "an")]
    max_repeats = rng.integers(1, 4)
    return " ".join(rng.permutation([unit for unit in units for _ in range(rng.integers(1, max_repeats + 1))]))


def _draw_timestamps(rng: np.random.Generator) -> tuple[float, ...]:
    """Draw the timestamps of a video's frames: those of the world, or in 10 % of cases of another duration."""
    if rng.random() < 0.1:
        length = rng.uniform(1, 30)
        return tuple(length * number / 8 for number in range(8))
    return WORLD_SECONDS


def _draw_plain_texts(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Draw texts about a scene for the tokenizer: descriptions, timestamps, questions and answers."""
    names = [*texts.list_questions(scene), "hear", "hear_first", "hear_last", "fit"]
    lines = [
        describe_objects(scene, rng),
        describe_sounds(scene.sounds, rng),
        prompts.format_timestamps(_draw_timestamps(rng)),
        str(rng.choice([texts.NO_AUDIO, texts.NO_FRAMES, texts.NO_MEDIA])),
    ]
    for name in names:
        lines += [str(rng.choice(texts.QUESTIONS[name])), texts.answer(name, scene)]
    return lines


def _encode(tokenizer: Tokenizer, text: str, bos: bool = False) -> np.ndarray:
    return np.array(tokenizer.encode(text, bos=bos, special=False), np.int32)


def _fill_placeholders(ids: np.ndarray, is_media: np.ndarray, description: np.ndarray) -> np.ndarray:
    """Replace placeholders with the ids of a description, truncated to the placeholders that are left."""
    ids = ids.copy()
    ids[is_media] = description[: is_media.sum()]
    return ids
