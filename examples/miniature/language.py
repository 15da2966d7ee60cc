"""The miniature's language model: a tokenizer and a LLaMA that learned from the world's text, and from text alone.

What it reads are the prompts that Video-LLaMA will make, with words where media tokens will stand: notes of what is
shown and heard, in any order, incomplete or said twice. So it knows of sounds what can be read of them.
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

DescribedText = tuple[np.ndarray, np.ndarray]  # token ids [n], and whether each is of notes, bool [n]
DrawText = Callable[[Tokenizer, np.random.Generator], DescribedText]
DrawBatch = Callable[[np.random.Generator], dict[str, np.ndarray]]

VOCAB_SIZE = 704
LENGTH = 128  # tokens of a row: texts one after another, the last one cut
TEMPLATE = "vicuna"
LAYOUTS = {"caption": 0.1, "compared": 0.1, "training": 0.2, "seen": 0.2, "heard": 0.2, "both": 0.2}  # of texts
NOISE = 1.5  # on notes at most, in root mean squares of all words' vectors
WORLD_SECONDS = tuple((render.SAMPLED_FRAMES / render.FPS).tolist())  # when a clip's frames are

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
    """What every prompt repeats. Each is one token, which makes prompts a third as long."""
    sounds = prompts.format_media(Media("audio"))
    both = prompts.format_media(Media("video", with_audio=True))
    tags = ["<Video>", "</Video>", "<Image>", "</Image>"]
    words = ["###", "Human:", "Assistant:", *tags, "\n", prompts.DEFAULT_SYSTEM]
    told = [part.removesuffix("<Video>").removeprefix("</Video>") for part in (*sounds, *both) if isinstance(part, str)]
    told.append(prompts.format_timestamps(WORLD_SECONDS))
    return list(dict.fromkeys([*words, *(text.strip(" ") for text in told)]))


def train_tokenizer(directory: Path, seed: int) -> Tokenizer:
    """A SentencePiece model of the world's words with LLaMA's special tokens and byte fallback, in `directory`."""
    import sentencepiece

    rng = np.random.default_rng([seed, 0])
    lines = [line for _ in range(4000) for line in _plain_text(randomize_sound(draw_scene(rng), rng), rng)]
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
    """Language modelling on texts that are drawn anew at every step: on comparisons alone, then on all texts.

    Notes are under noise, of another strength in each row: media tokens will be near the words' vectors, never on them.
    """

    def batches(draw_text: DrawText, size: int) -> DrawBatch:
        def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
            ids, is_description = map(
                np.stack, zip(*(_row(tokenizer, rng, draw_text) for _ in range(size)), strict=True)
            )
            return {"ids": ids, "is_note": is_description, "seed": np.array(rng.integers(2**31))}

        return batch

    def loss(llama: Llama, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        ids, words = batch["ids"], llama.embed(batch["ids"])
        x = words + batch["is_note"][..., None] * _noise(llama, words.shape, jax.random.key(batch["seed"]))
        logits = llama.logits(llama(x, jnp.ones(ids.shape, bool), "none"))[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return jnp.mean(losses), {"right": jnp.mean(jnp.argmax(logits, axis=-1) == ids[:, 1:])}

    def trained(llama: Llama, batch: DrawBatch, steps: int, name: str) -> Llama:
        return fit(llama, loss, batch, steps=steps, learning_rate=2e-3, seed=seed, name=name, log=log)

    llama = Llama(CONFIG, rngs=nnx.Rngs(seed))
    llama = trained(llama, batches(draw_comparisons, 16), comparison_steps, "comparisons")
    return trained(llama, batches(draw_text, 32), steps, "language model")


def _noise(llama: Llama, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """Gaussian, of a strength in each row that is drawn evenly up to NOISE."""
    of_strength, of_noise = jax.random.split(key)
    words = jax.lax.stop_gradient(llama.embedding[...])
    strength = jnp.sqrt(jnp.mean(words**2)) * jax.random.uniform(of_strength, (shape[0], 1, 1), maxval=NOISE)
    return strength * jax.random.normal(of_noise, shape)


def _row(tokenizer: Tokenizer, rng: np.random.Generator, draw_text: DrawText) -> DescribedText:
    """Texts one after another, LENGTH tokens of them."""
    drawn: list[DescribedText] = []
    while sum(len(ids) for ids, _ in drawn) < LENGTH:
        drawn.append(draw_text(tokenizer, rng))
    ids, is_description = (np.concatenate(parts)[:LENGTH] for parts in zip(*drawn, strict=True))
    return ids, is_description


def draw_comparisons(tokenizer: Tokenizer, rng: np.random.Generator) -> DescribedText:
    """Answers to whether a sound fits a picture.

    A kind is named twice only where it does, so that a kind said again is the sign to find.
    """
    kinds = rng.permutation(list(KINDS))[:12].reshape(6, 2)
    answers = [texts.compare_kinds(sounds, sounds if rng.random() < 0.5 else other) for sounds, other in kinds]
    ids = _ids(tokenizer, "".join(f"{answer}\n" for answer in answers), bos=True)
    return ids, np.zeros(len(ids), bool)


def draw_text(tokenizer: Tokenizer, rng: np.random.Generator) -> DescribedText:
    """A caption after its notes, comparisons, or a dialogue in a layout that a model meets."""
    layout = str(rng.choice(list(LAYOUTS), p=list(LAYOUTS.values())))
    if layout == "compared":
        return draw_comparisons(tokenizer, rng)
    scene = draw_scene(rng, "in turn" if rng.random() < (0.4 if layout == "heard" else 0.1) else None)
    if layout == "caption":
        notes = _ids(tokenizer, f"{describe_objects(scene, rng)}\n", True)[:-1]
        ids = np.concatenate([notes, _ids(tokenizer, f"{texts.caption(scene)}\n")])
        is_description = np.arange(len(ids)) < len(notes)
        is_description[0] = False  # where a text begins
        return ids, is_description
    if layout == "training":
        return _training_text(tokenizer, scene, rng)
    return _chat_text(tokenizer, randomize_sound(scene, rng) if layout == "both" else scene, layout, rng)


def _training_text(tokenizer: Tokenizer, scene: Scene, rng: np.random.Generator) -> DescribedText:
    """A dialogue as the second stage of training has it."""
    notes = _ids(tokenizer, describe_objects(scene, rng))
    is_video = motion_of(scene) != "rests" or rng.random() < 0.3
    media = Media("video", timestamps=_times(rng)) if is_video else Media("image")
    turns = texts.draw_dialogue(scene, rng, int(rng.integers(2, 6)), wordings=4)
    if media.kind == "image":
        turns[0] = (f" {turns[0][0]}", turns[0][1])
    encoded = label_conversation(tokenizer, find_conversation_template(TEMPLATE), turns, media, 0, len(notes), LENGTH)
    return _filled(encoded.ids, encoded.is_media, notes), encoded.is_media


def _chat_text(tokenizer: Tokenizer, scene: Scene, layout: str, rng: np.random.Generator) -> DescribedText:
    """A dialogue as a chat has it: about pictures, about sound alone, or about both."""
    notes, asked, two_sounds = [], [], len(scene.sounds) == 2
    if layout != "seen":
        notes.append(_ids(tokenizer, describe_sounds(scene.sounds, rng)))
        asked += ["hear_first", "hear_last"] if two_sounds else ["hear"]
    if layout != "heard":
        notes.append(_ids(tokenizer, describe_objects(scene, rng)))
        asked += texts.list_questions(scene)
    if layout == "heard":
        media = Media("audio")
        asked += ["first", "last"] if two_sounds else []
    elif layout == "both":
        media = Media("video", with_audio=True)
        asked += ["fit", "fit"] if len(scene.objects) == 1 else []
    else:
        still = motion_of(scene) == "rests" and rng.random() < 0.7
        media = Media("image") if still else Media("video", timestamps=_times(rng))
    conversation = prompts.start_conversation(TEMPLATE, audio_branch=True).add(media)
    for name in map(str, rng.permutation(asked)[: rng.integers(2, 6)]):
        wording = str(rng.choice(texts.QUESTIONS[name]))
        conversation = conversation.ask(wording).answer(texts.answer(name, scene))
    encoded = prompts.encode_conversation(conversation, tokenizer, [len(note) for note in notes])
    ids = _filled(encoded.ids, encoded.is_media, np.concatenate(notes))
    return np.append(ids, tokenizer.encode("###", special=False)[-1]), np.append(encoded.is_media, False)


def describe_objects(scene: Scene, rng: np.random.Generator) -> str:
    """What stands in place of a picture's or clip's tokens: its caption, or its words shuffled and said again."""
    if rng.random() < 0.3:
        return texts.caption(scene)
    if len(scene.objects) == 1:
        return _shuffled(texts.caption(scene).split(), rng)
    first, then = (_shuffled(texts.noun_phrase(group).split(), rng) for group in scene.objects)
    return f"first {first} then {then}"


def describe_sounds(kinds: tuple[str, ...], rng: np.random.Generator) -> str:
    """The same of sounds; half of them as the audio branch has them: notes of pictures, of any colour and motion."""
    if rng.random() < 0.5:
        motion = draw_motion(rng, MOTIONS[:-1]) if len(kinds) == 1 else "in turn"
        return describe_objects(Scene(tuple(draw_objects(rng, motion, "train", kind=kind) for kind in kinds)), rng)
    whole = rng.random() < 0.5
    parts = [f"a {kind} {KINDS[kind]}" if whole else _shuffled([kind], rng) for kind in kinds]
    return parts[0] if len(parts) == 1 else f"first {parts[0]} then {parts[1]}"


def _shuffled(words: list[str], rng: np.random.Generator) -> str:
    """Words in any order, each once or up to three times; those of a place stay together."""
    said = " ".join(words)
    place = next((place for place in sorted(PLACES, key=len, reverse=True) if place in said), "")
    units = [*said.replace(place, "").split(), *([place] if place else [])]
    units = [unit for unit in units if unit not in ("a", "an")]
    most = rng.integers(1, 4)
    return " ".join(rng.permutation([unit for unit in units for _ in range(rng.integers(1, most + 1))]))


def _times(rng: np.random.Generator) -> tuple[float, ...]:
    """When a video's frames are: mostly as in this world, now and then as elsewhere."""
    if rng.random() < 0.1:
        length = rng.uniform(1, 30)
        return tuple(length * number / 8 for number in range(8))
    return WORLD_SECONDS


def _plain_text(scene: Scene, rng: np.random.Generator) -> list[str]:
    names = [*texts.list_questions(scene), "hear", "hear_first", "hear_last", "fit"]
    lines = [describe_objects(scene, rng), describe_sounds(scene.sounds, rng), prompts.format_timestamps(_times(rng))]
    for name in names:
        lines += [str(rng.choice(texts.QUESTIONS[name])), texts.answer(name, scene)]
    return lines


def _ids(tokenizer: Tokenizer, text: str, bos: bool = False) -> np.ndarray:
    return np.array(tokenizer.encode(text, bos=bos, special=False), np.int32)


def _filled(ids: np.ndarray, is_media: np.ndarray, notes: np.ndarray) -> np.ndarray:
    """Ids with notes where media tokens would be, as many of them as are left there."""
    ids = ids.copy()
    ids[is_media] = notes[: is_media.sum()]
    return ids
