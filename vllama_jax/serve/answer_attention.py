"""Which frames and audio clips the tokens of an answer were read from, for the page of `vllama serve`.

The language model's attention from a token to the media tokens, times the Q-Formers' attention from those to frames and
audio clips. Both are means over layers and heads: a picture of where information may come from, not a proof of it.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float

from vllama_jax.chat import PreparedMedia, embed_prompt
from vllama_jax.generate.prompt import EmbeddedPrompt, media_rows, padded_prompt_length
from vllama_jax.nn import attention_maps
from vllama_jax.nn.video_llama import VideoLlama, splice
from vllama_jax.text import prompts

if TYPE_CHECKING:
    from vllama_jax.model import Model

_ANSWER_MULTIPLE = 64  # answers are padded to multiples of it, so that few programs are compiled
_Shares = Callable[[VideoLlama, jax.Array | np.ndarray], jax.Array]
_SHARES: dict[str, tuple[str, _Shares]] = {
    "audio": ("clips", attention_maps.clip_shares),
    "vision": ("frames", attention_maps.frame_shares),
}


def find_attended_media(
    model: "Model",
    conversation: prompts.Conversation,
    media: Sequence[PreparedMedia],
    encoded: "Sequence[jax.Array]",
    answer: str,
) -> list[dict[str, Any]]:
    """Return for each token of an answer which frames and audio clips it reads.

    Args:
        model: The model.
        conversation: The conversation, which ends with the question.
        media: The files of the conversation, in order.
        encoded: Their media tokens, as `chat.encode_media` returns them for each file.
        answer: The answer.

    Returns:
        An object for each token, with its `text` and for each file an object with the shares of its `frames` and
        `clips`. All shares of a token sum to 1, unless the model has branches other than vision and audio.

    Raises:
        ConfigError: The conversation is longer than the model's context.
    """
    start = len(embed_prompt(model, conversation, encoded, 0))
    prompt = embed_prompt(model, conversation, encoded, 0, answer)
    weights = _attend(model.network, prompt, np.arange(start - 1, len(prompt) - 1))[:, prompt.is_media]
    weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    shares = _read_shares(model.network, media, weights)
    texts = _split_text(model, prompt.ids[start:])
    return [
        {"text": text, "files": [{name: one[number].tolist() for name, one in file.items()} for file in shares]}
        for number, text in enumerate(texts)
    ]


def _attend(network: VideoLlama, prompt: EmbeddedPrompt, positions: np.ndarray) -> Float[np.ndarray, "a n"]:
    """Return the attention of the language model from positions of a prompt. A token is predicted at the one before."""
    length = padded_prompt_length(len(prompt))
    padding = (0, length - len(prompt))
    ids, is_media = np.pad(prompt.ids, padding)[None], np.pad(prompt.is_media, padding)[None]
    media = media_rows(prompt, 0, len(prompt), length)[None]
    embeddings = splice(network.llama.embed(ids), is_media, media)[0]
    asked = np.pad(positions, (0, -len(positions) % _ANSWER_MULTIPLE))
    weights = attention_maps.token_attention(network.llama, embeddings, np.arange(length) < len(prompt), asked)
    return np.asarray(weights)[: len(positions), : len(prompt)]


def _read_shares(
    network: VideoLlama, media: Sequence[PreparedMedia], weights: Float[np.ndarray, "a m"]
) -> list[dict[str, Float[np.ndarray, "a k"]]]:
    """Return for each file the shares of its frames [a, t] and clips [a, s], of tokens that attend to media tokens."""
    found, first = [], 0
    for prepared in media:
        file = {"frames": np.zeros((len(weights), 0)), "clips": np.zeros((len(weights), 0))}
        for name, array in prepared.arrays.items():
            for branch in network.branches:
                if branch.prompt_array != name:
                    continue
                last = first + branch.num_tokens(network.cfg)
                if branch.name in _SHARES:
                    what, read = _SHARES[branch.name]
                    file[what] = weights[:, first:last] @ np.asarray(read(network, array), weights.dtype)
                first = last
        found.append(file)
    return found


def _split_text(model: "Model", ids: np.ndarray) -> list[str]:
    """Return the text that each token adds to an answer."""
    texts = [model.tokenizer.decode(ids[:end].tolist()) for end in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]
