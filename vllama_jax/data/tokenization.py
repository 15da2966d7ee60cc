"""What records say → the arrays of a batch: ids, where media go, and labels, padded to one length."""

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.data.config import TextConfig
from vllama_jax.text.prompts import Media
from vllama_jax.text.templates import find_caption_template, find_conversation_template
from vllama_jax.text.tokenizer import Tokenizer
from vllama_jax.text.training import TrainingText, clean_caption, encode_caption, label_conversation

if TYPE_CHECKING:
    from vllama_jax.data.annotation import Annotation

LENGTH_STEP = 128  # beyond the configured lengths


def encode_text(
    annotation: "Annotation",
    cfg: TextConfig,
    tokenizer: Tokenizer,
    media_length: int,
    timestamps: tuple[float, ...],
    draw: np.random.Generator,
) -> TrainingText:
    """What a record says, in the layout that its dataset's config asks for. `cfg.template` is named."""
    media = Media(annotation.kind, timestamps=timestamps)
    if cfg.layout == "conversation":
        template = find_conversation_template(cfg.template)
        where = (media, annotation.media_at, media_length)
        return label_conversation(tokenizer, template, annotation.turns, *where, cfg.max_length)
    wrapped = find_caption_template(cfg.template)
    caption = " ".join(answer for _, answer in annotation.turns)
    caption = clean_caption(caption) if cfg.clean else caption
    instruction = cfg.instructions[draw.integers(len(cfg.instructions))] if cfg.instructions else None
    return encode_caption(tokenizer, wrapped, caption, media, instruction, media_length, cfg.max_length)


def pad_texts(
    texts: Sequence[TrainingText], length: int, num_media_tokens: int, masked: Container[int] = ()
) -> dict[str, np.ndarray]:
    """The arrays of a batch (train/step.py) that come from texts, cut or padded to `length`; no labels in masked rows.

    A row has at most `length - media_tokens` labels: what the media tokens follow or are has none.
    """
    count, most = len(texts), length - num_media_tokens
    arrays = {
        "ids": np.zeros((count, length), np.int32),
        "is_media": np.zeros((count, length), bool),
        "length": np.zeros(count, np.int32),
        "positions": np.zeros((count, most), np.int32),
        "targets": np.full((count, most), -1, np.int32),
    }
    for row, text in enumerate(texts):
        n = min(len(text.ids), length)
        arrays["ids"][row, :n] = text.ids[:n]
        arrays["is_media"][row, :n] = text.is_media[:n]
        arrays["length"][row] = n
        labelled = np.flatnonzero(text.labels[:n] >= 0)
        if row not in masked:
            arrays["positions"][row, : len(labelled)] = labelled - 1
            arrays["targets"][row, : len(labelled)] = text.labels[labelled]
    return arrays


def padded_length(longest: int, lengths: Sequence[int]) -> int:
    """The first of the lengths that holds `longest`; beyond them, multiples of 128."""
    return next((length for length in lengths if length >= longest), -(-longest // LENGTH_STEP) * LENGTH_STEP)
