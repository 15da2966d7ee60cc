"""Prompts of the language model: token ids and encoded media."""

import dataclasses
import functools

import numpy as np
import xxhash
from jaxtyping import Array, Bool, Float, Int

from vllama_jax.config import LlamaConfig
from vllama_jax.errors import ContextLengthError

PADDED_LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedPrompt:
    """A prompt whose media are encoded.

    Attributes:
        ids: Token ids, 0 at placeholders.
        is_media: Whether a position is a placeholder.
        media: The media tokens for the placeholders, in order.
    """

    ids: Int[np.ndarray, " n"]
    is_media: Bool[np.ndarray, " n"]
    media: Float[Array | np.ndarray, "m w"]

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def identity(self) -> Int[np.ndarray, " n"]:
        """What a position holds, as one number: the token id, or a negative digest of the media token."""
        digests = [-1 - (xxhash.xxh3_64_intdigest(row.tobytes()) >> 2) for row in np.asarray(self.media)]
        identity = self.ids.astype(np.int64)
        identity[self.is_media] = digests
        return identity


def padded_prompt_length(length: int) -> int:
    """Return the length that a prompt is padded to. There are few such lengths, so that few programs are compiled."""
    return next((size for size in PADDED_LENGTHS if size >= length), -(-length // 4096) * 4096)


def check_context_length(prompt: int, new: int, cfg: LlamaConfig) -> None:
    """Check that a prompt and its answer fit the model's context.

    Args:
        prompt: The length of the prompt in tokens.
        new: The maximum number of new tokens.
        cfg: The language model's config.

    Raises:
        ContextLengthError: Together they are longer than the context.
    """
    if prompt + new > cfg.max_length:
        remaining = cfg.max_length - prompt
        advice = f", or set max_new_tokens to at most {remaining}" if remaining > 0 else ""
        raise ContextLengthError(
            f"the prompt has {prompt} tokens and max_new_tokens is {new}, but the model's context has "
            f"{cfg.max_length} tokens; remove turns or media{advice}"
        )


def media_rows(prompt: EmbeddedPrompt, start: int, stop: int, length: int) -> Float[np.ndarray, "length w"]:
    """Return the media tokens of the positions from `start` to `stop`, padded to `length` with zeros."""
    first, last = (int(prompt.is_media[:end].sum()) for end in (start, stop))
    rows = np.asarray(prompt.media[first:last])
    return np.pad(rows, ((0, length - len(rows)), (0, 0)))
