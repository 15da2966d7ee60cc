"""Ask a model about encoded files: greedy answers in batches, dialogues, and the probabilities of given answers."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vllama_jax import generate
from vllama_jax.chat import make_engine
from vllama_jax.config import GenerationConfig
from vllama_jax.miniature.holdout_files import EncodedFiles
from vllama_jax.model import Model
from vllama_jax.nn.video_llama import VideoLlama, splice
from vllama_jax.text import prompts
from vllama_jax.text.prompts import Conversation, Media
from vllama_jax.text.templates import find_template

MAX_NEW_TOKENS = 24


def ask(model: Model, files: EncodedFiles, question: str) -> list[str]:
    """Answer one question about every file, greedily and in batches."""
    return [answer for (answer,) in ask_dialogues(model, files, [[question]] * len(files.scenes))]


def ask_dialogues(model: Model, files: EncodedFiles, questions: Sequence[Sequence[str]]) -> list[list[str]]:
    """Answer questions about every file in turn, greedily and in batches. Earlier answers stay in the prompt.

    Args:
        model: The model.
        files: The files.
        questions: The questions about each file. All files have the same number of them.

    Returns:
        The answers about each file.
    """
    results, remaining = [], list(questions)
    for batch in files.batches():
        size = len(batch.scenes)
        results += _ask_batch(model, batch, remaining[:size])
        remaining = remaining[size:]
    return results


def _ask_batch(model: Model, files: EncodedFiles, questions: Sequence[Sequence[str]]) -> list[list[str]]:
    template, tokenizer = find_template(model.config.template), model.tokenizer
    engine, media_tokens = make_engine(model, len(files.scenes)), _compute_media_tokens(model, files)
    conversations, answers = _start_conversations(model, files), [list[str]() for _ in files.scenes]
    for turn in zip(*questions, strict=True):
        conversations = [one.ask(question) for one, question in zip(conversations, turn, strict=True)]
        generated = generate_tokens(model, engine, _make_prompts(model, conversations, media_tokens))
        for row, tokens in enumerate(generated):
            answers[row].append(prompts.decode_answer(tokenizer, template, tokens))
            conversations[row] = conversations[row].answer(*prompts.decode_past_answer(tokenizer, template, tokens))
    return answers


def generate_tokens(
    model: Model, engine: generate.Engine, embedded: Sequence[generate.EmbeddedPrompt]
) -> list[list[int]]:
    """Generate the tokens of an answer to each prompt, greedily and at the same time.

    Args:
        model: The model.
        engine: An engine of the model, which is not busy.
        embedded: The prompts, with their media tokens.
    """
    config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS)
    stops = prompts.stop_sequences(model.tokenizer, find_template(model.config.template))
    generations = [engine.add(generate.Request(prompt=prompt, config=config, stops=stops)) for prompt in embedded]
    while engine.is_busy:
        engine.step()
    return [generation.tokens for generation in generations]


def _start_conversations(model: Model, files: EncodedFiles) -> list[Conversation]:
    """Return a conversation about each file, without a question."""
    start = prompts.start_conversation(model.config.template, model.config.has_audio)
    return [start.add(_get_prompt_media(media, files)) for media in files.media]


def _compute_media_tokens(model: Model, files: EncodedFiles) -> list[np.ndarray]:
    """Compute the media tokens of each placeholder: float32 [files, tokens, width]."""
    media_tokens = []
    if files.audio_vectors is not None:
        media_tokens.append(np.asarray(_make_media_token_function("audio")(model.network, files.audio_vectors)))
    if files.features is not None:
        media_tokens.append(np.asarray(_make_media_token_function("video")(model.network, files.features)))
    return media_tokens


def _make_prompts(
    model: Model, conversations: Sequence[Conversation], media_tokens: Sequence[np.ndarray]
) -> list[generate.EmbeddedPrompt]:
    """Make the prompt of each conversation."""
    embedded, counts = [], [tokens.shape[1] for tokens in media_tokens]
    for row, conversation in enumerate(conversations):
        encoded = prompts.encode_conversation(conversation, model.tokenizer, counts)
        tokens_of_file = np.concatenate([tokens[row] for tokens in media_tokens])
        embedded.append(generate.EmbeddedPrompt(encoded.ids, encoded.is_media, tokens_of_file))
    return embedded


def _get_prompt_media(media: Media, files: EncodedFiles) -> Media:
    """Return how the prompt describes a file, of which only the frames or only the audio may be used."""
    if files.features is None:
        return Media("audio")
    return dataclasses.replace(media, with_audio=files.audio_vectors is not None)


def answer_log_probabilities(model: Model, files: EncodedFiles, question: str, answers: Sequence[str]) -> np.ndarray:
    """Return the log probability of an answer to the question about each file: float [n]."""
    results, remaining = [], list(answers)
    for batch in files.batches():
        batch_answers, remaining = remaining[: len(batch.scenes)], remaining[len(batch.scenes) :]
        media_tokens = _compute_media_tokens(model, batch)
        asked = [conversation.ask(question) for conversation in _start_conversations(model, batch)]
        answered = [conversation.answer(text) for conversation, text in zip(asked, batch_answers, strict=True)]
        questions, dialogues = (_make_prompts(model, given, media_tokens) for given in (asked, answered))
        length = generate.padded_prompt_length(max(len(prompt.ids) for prompt in dialogues))
        ids, is_media = (np.stack([np.pad(x, (0, length - len(x))) for x in arrays]) for arrays in (
            [prompt.ids for prompt in dialogues], [prompt.is_media for prompt in dialogues]
        ))  # fmt: skip
        spans = np.array([(len(start.ids), len(end.ids)) for start, end in zip(questions, dialogues, strict=True)])
        media = np.stack([prompt.media for prompt in dialogues])
        results.append(np.asarray(_sum_log_probabilities(model.network, ids, is_media, media, spans)))
    return np.concatenate(results)


@jax.jit
def _sum_log_probabilities(
    network: VideoLlama, ids: jax.Array, is_media: jax.Array, media: jax.Array, spans: jax.Array
) -> jax.Array:
    """Sum the log probabilities of the tokens in each span [start, end): float32 [b]."""
    positions = jnp.arange(ids.shape[1])
    x = splice(network.embed(ids), is_media, media)
    logits = network(x, positions < spans[:, 1:])
    log_probabilities = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=2)[..., 0]
    in_span = (positions[1:] >= spans[:, :1]) & (positions[1:] < spans[:, 1:])
    return jnp.sum(log_probabilities * in_span, axis=1)


@functools.cache
def _make_media_token_function(branch: str) -> Any:
    """Make a compiled function from features or audio vectors to media tokens."""
    if branch == "audio":
        return jax.jit(lambda network, vectors: network.audio_tokens(vectors))
    return jax.jit(lambda network, features: network.video_tokens(features))
