"""Which frames and audio clips the tokens of an answer were read from, for the page of `vllama serve`.

The language model's attention from a token to the media tokens, times the Q-Formers' attention from those to frames and
audio clips. Both are means over layers and heads: a picture of where information may come from, not a proof of it.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vllama_jax.chat import embed_prompt
from vllama_jax.generate.prompt import EmbeddedPrompt, media_rows, padded_prompt_length
from vllama_jax.media_tokens import PreparedMedia
from vllama_jax.nn import attention_maps
from vllama_jax.nn.video_llama import VideoLlama, splice
from vllama_jax.text import prompts

if TYPE_CHECKING:
    from vllama_jax.model import Model
    from vllama_jax.text.tokenizer import Tokenizer

_ANSWER_MULTIPLE = 64  # answers are padded to multiples of it, so that few programs are compiled
_SHARES = {"vision": attention_maps.frame_shares, "audio": attention_maps.clip_shares}


def read_shares(network: VideoLlama, prepared: PreparedMedia) -> list[Float[np.ndarray, "m k"]]:
    """Return how much each media token of a file reads its frames [m, t], and its audio clips [m, s].

    Either is empty for a file without frames or audio. Tokens of a branch other than vision and audio read nothing.
    """
    read: dict[str, list[np.ndarray]] = {"frames": [], "mel": []}
    for name, array in prepared.arrays.items():
        for branch in network.branches:
            if branch.prompt_array != name:
                continue
            count = branch.num_tokens(network.cfg)
            shares = _SHARES[branch.name](network, array) if branch.name in _SHARES else np.zeros((count, len(array)))
            for other in read:
                columns = len(prepared.arrays.get(other, ()))
                read[other].append(np.asarray(shares) if other == name else np.zeros((count, columns)))
    return [np.concatenate(one) if one else np.zeros((0, 0)) for one in read.values()]


def find_attended_media(
    model: "Model",
    conversation: prompts.Conversation,
    media: Sequence[Sequence[np.ndarray]],
    shares: Sequence[Sequence[np.ndarray]],
    answer: str,
) -> list[dict[str, Any]]:
    """Return for each token of an answer which frames and audio clips it reads.

    Args:
        model: The model.
        conversation: The conversation, which ends with the question.
        media: The media tokens of each file, as `media_tokens.encode_media` returns them.
        shares: What `read_shares` returns for each file.
        answer: The answer.

    Returns:
        An object for each token, with its `text` and for each file an object with the shares of its `frames` and
        `clips`. All shares of a token sum to 1, unless the model has branches other than vision and audio.

    Raises:
        ConfigError: The conversation is longer than the model's context.
    """
    tokens = [array for file in media for array in file]
    start = len(embed_prompt(model, conversation, tokens, 0))  # type: ignore[arg-type]
    prompt = embed_prompt(model, conversation, tokens, 0, answer)  # type: ignore[arg-type]
    weights = _attend(model.network, prompt, np.arange(start - 1, len(prompt) - 1))[:, prompt.is_media]
    weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    bounds = np.cumsum([0, *(sum(map(len, file)) for file in media)])
    files = [
        [weights[:, first:last] @ one for one in file]
        for (first, last), file in zip(itertools.pairwise(bounds), shares, strict=True)
    ]
    return [
        {
            "text": text,
            "files": [{"frames": frames[number].tolist(), "clips": clips[number].tolist()} for frames, clips in files],
        }
        for number, text in enumerate(split_text(model.tokenizer, prompt.ids[start:]))
    ]


def _attend(network: VideoLlama, prompt: EmbeddedPrompt, positions: np.ndarray) -> Float[np.ndarray, "a n"]:
    """Return the attention of the language model from positions of a prompt. A token is predicted at the one before."""
    length = padded_prompt_length(len(prompt))
    padding = (0, length - len(prompt))
    ids, is_media = (jnp.asarray(np.pad(one, padding))[None] for one in (prompt.ids, prompt.is_media))
    media = jnp.asarray(media_rows(prompt, 0, len(prompt), length))[None]
    embeddings = splice(network.llama.embed(ids), is_media, media)[0]
    asked = np.pad(positions, (0, -len(positions) % _ANSWER_MULTIPLE))
    weights = attention_maps.token_attention(network.llama, embeddings, np.arange(length) < len(prompt), asked)
    return np.asarray(weights)[: len(positions), : len(prompt)]


def split_text(tokenizer: "Tokenizer", ids: np.ndarray) -> list[str]:
    """Return the text that each token adds to an answer. A character of several tokens belongs to the last of them."""
    ends = range(len(ids))
    texts = [*(tokenizer.decode_stable_prefix(ids[:end]) for end in ends), tokenizer.decode(ids)]
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]
