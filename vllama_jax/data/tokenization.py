"""Convert the texts of records to the arrays of a batch: token ids, placeholders and labels, padded to one length."""

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax.data.config import TextConfig
from vllama_jax.text.prompts import Media
from vllama_jax.text.templates import find_caption_template, find_conversation_template
from vllama_jax.text.tokenizer import Tokenizer
from vllama_jax.text.training import TrainingText, clean_caption, encode_caption, label_conversation

if TYPE_CHECKING:
    from vllama_jax.data.annotation import Annotation

LENGTH_STEP = 128  # longer sequences than all length buckets are padded to a multiple of this


def encode_text(
    annotation: "Annotation",
    cfg: TextConfig,
    tokenizer: Tokenizer,
    media_length: int,
    timestamps: tuple[float, ...],
    rng: np.random.Generator,
) -> TrainingText:
    """Tokenize the texts of a record in the layout of its dataset.

    Args:
        annotation: The annotation of the record.
        cfg: The dataset's text config. `cfg.template` must not be empty.
        tokenizer: The model's tokenizer.
        media_length: The number of media tokens.
        timestamps: Of a video's frames, in seconds; without them, the prompt does not mention them.
        rng: Draws the instruction of a caption.

    Returns:
        Token ids, placeholders and labels.
    """
    media = Media(annotation.kind, timestamps=timestamps)
    if cfg.layout == "conversation":
        template = find_conversation_template(cfg.template)
        return label_conversation(
            tokenizer, template, annotation.turns, media, annotation.media_at, media_length, cfg.max_length
        )
    caption_template = find_caption_template(cfg.template)
    caption = " ".join(answer for _, answer in annotation.turns)
    caption = clean_caption(caption) if cfg.clean else caption
    instruction = cfg.instructions[rng.integers(len(cfg.instructions))] if cfg.instructions else None
    return encode_caption(tokenizer, caption_template, caption, media, instruction, media_length, cfg.max_length)


def pad_texts(
    texts: Sequence[TrainingText], length: int, num_media_tokens: int, masked: Container[int] = ()
) -> dict[str, np.ndarray]:
    """Pad or truncate texts to the arrays of a batch (train/step.py).

    Args:
        texts: One for each row.
        length: The padded length, in tokens.
        num_media_tokens: The number of media tokens of each text.
        masked: Rows without labels.

    Returns:
        `ids` int32 and `is_media` bool [b, length]; `length` int32 [b], without padding; `targets` and `positions`
        int32 [b, length - num_media_tokens]: the labels, padded with -1, and the positions whose logits predict them.
        Media tokens have no labels, so no row has more.
    """
    count, max_labels = len(texts), length - num_media_tokens
    arrays = {
        "ids": np.zeros((count, length), np.int32),
        "is_media": np.zeros((count, length), bool),
        "length": np.zeros(count, np.int32),
        "positions": np.zeros((count, max_labels), np.int32),
        "targets": np.full((count, max_labels), -1, np.int32),
    }
    for row, text in enumerate(texts):
        n = min(len(text.ids), length)
        arrays["ids"][row, :n] = text.ids[:n]
        arrays["is_media"][row, :n] = text.is_media[:n]
        arrays["length"][row] = n
        labeled = np.flatnonzero(text.labels[:n] >= 0)
        if row not in masked:
            arrays["positions"][row, : len(labeled)] = labeled - 1
            arrays["targets"][row, : len(labeled)] = text.labels[labeled]
    return arrays


def extend_padding(arrays: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Pad the texts of a batch to a greater length, with the result of `pad_texts` for that length.

    Args:
        arrays: The arrays of a batch: those of `pad_texts`, and others, which stay the same.
        length: The padded length, in tokens, at least that of the arrays.
    """
    more = length - arrays["ids"].shape[1]
    if not more:
        return dict(arrays)
    fill = {"ids": 0, "is_media": False, "positions": 0, "targets": -1}
    return {
        name: np.pad(array, ((0, 0), (0, more)), constant_values=fill[name]) if name in fill else array
        for name, array in arrays.items()
    }


def padded_length(longest: int, lengths: Sequence[int]) -> int:
    """Return the first of `lengths` that is at least `longest`, or else the next multiple of 128.

    Args:
        longest: The longest sequence of a step, in tokens.
        lengths: The configured lengths, in ascending order.
    """
    return next((length for length in lengths if length >= longest), -(-longest // LENGTH_STEP) * LENGTH_STEP)
