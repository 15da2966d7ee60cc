"""Tokenize training texts: token ids, placeholders and labels.

There are two layouts, both the reference's. A caption follows media, directly or after an instruction, and only the
caption has labels. In a conversation, the answers and the text that ends a turn have labels. User input is always text:
`</s>` or `<ImageHere>` in it are plain characters, while the reference parses them as tokens.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from vllama_jax.errors import DataError
from vllama_jax.text.prompts import Media, encode_prompt, format_media
from vllama_jax.text.templates import (
    LABELED,
    UNLABELED,
    CaptionTemplate,
    ConversationTemplate,
    LabeledPrompt,
    Mark,
    Prompt,
    find_caption_template,
)
from vllama_jax.text.tokenizer import Tokenizer

IGNORE_INDEX = -100  # the label of a token that is excluded from the loss
PLAIN_TEMPLATE = "plain"  # for captions without an instruction (stage 1)

# The reference's instructions for images and videos (prompts/alignment_image.txt).
ALIGNMENT_INSTRUCTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)

_PUNCTUATION = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingText:
    """A tokenized training text.

    Attributes:
        ids: Token ids, 0 at placeholders.
        is_media: Whether each position is a placeholder.
        labels: The token itself where it has a label, else IGNORE_INDEX. They are not shifted: label i is predicted
            from the tokens before i.
    """

    ids: Int32[np.ndarray, "n"]
    is_media: Bool[np.ndarray, "n"]
    labels: Int32[np.ndarray, "n"]


def encode_caption(
    tokenizer: Tokenizer,
    template: CaptionTemplate,
    caption: str,
    media: Media,
    instruction: str | None,
    media_length: int,
    max_length: int,
) -> TrainingText:
    """Tokenize a BOS, media, and a caption with its end, which have labels (reference: models/video_llama.py).

    Args:
        tokenizer: The model's tokenizer.
        template: The caption form of the prompt template.
        caption: The caption.
        media: The media file. Its timestamps are not used, and a video gets the tags of an image, as in the reference.
        instruction: Precedes the caption. If None, the caption follows the media directly and has the end of
            PLAIN_TEMPLATE, whatever the template.
        media_length: Number of media tokens.
        max_length: Maximum length of the caption with its end, in tokens; a longer one is truncated. The caption is
            tokenized separately from the prompt.

    Returns:
        Token ids, placeholders and labels.
    """
    if instruction is None:
        template = find_caption_template(PLAIN_TEMPLATE)
        prompt: Prompt = (Mark.MEDIA,)
    else:
        before, after = template.wrap
        introduced_media = _introduce_media(media if media.kind == "audio" else Media("image"))
        prompt = (*before, *introduced_media, instruction, *after)
    encoded = encode_prompt(tokenizer, prompt, [media_length])
    caption_ids = encode_prompt(tokenizer, (caption, *template.end), [], add_bos=False).ids[:max_length]
    return TrainingText(
        ids=np.concatenate([encoded.ids, caption_ids]),
        is_media=np.concatenate([encoded.is_media, np.zeros(len(caption_ids), bool)]),
        labels=np.concatenate([np.full(len(encoded.ids), IGNORE_INDEX, np.int32), caption_ids]),
    )


def label_conversation(
    tokenizer: Tokenizer,
    template: ConversationTemplate,
    turns: Sequence[tuple[str, str]],
    media: Media,
    media_at: int,
    media_length: int,
    max_length: int,
) -> TrainingText:
    """Tokenize a conversation, whose answers have labels (reference: datasets/video_instruct_dataset.py).

    Args:
        tokenizer: The model's tokenizer.
        template: The conversation form of the prompt template.
        turns: (question, answer) pairs.
        media: The media file of the first question. `with_audio` is not supported. The prompt mentions the timestamps
            of a video if there are any.
        media_at: Position of the media in the first question, in characters.
        media_length: Number of media tokens.
        max_length: Maximum length in tokens, including BOS and media tokens. The rest is truncated, even if it contains
            media tokens; there may be no labels left.

    Returns:
        Token ids, placeholders and labels.

    Raises:
        DataError: There are no turns.
    """
    if not turns:
        raise DataError("a conversation without turns: it has no labels")
    segments = template.opening
    for number, (question, answer) in enumerate(turns):
        asked = (*template.next_question, question) if number else _build_first_question(question, media, media_at)
        segments += tuple((segment, UNLABELED) for segment in (*asked, *template.question_end))
        segments += tuple((segment, LABELED) for segment in (*template.answer_start, answer, *template.answer_end))
    return _encode_labeled(tokenizer, segments, media_length, max_length)


def clean_caption(caption: str, max_words: int = 50) -> str:
    """Convert a caption to lower case, replace punctuation by spaces, and truncate it to `max_words` words.

    Equals the reference's processors/blip_processors.py, which applies it to WebVid's captions only.
    """
    text = re.sub(r"\s{2,}", " ", caption.lower().translate(_PUNCTUATION))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def _build_first_question(question: str, media: Media, media_at: int) -> Prompt:
    if media.kind == "image":
        return (question[:media_at], "<Image>", Mark.MEDIA, "</Image>", question[media_at:])
    return (question[:media_at], *_introduce_media(media), question[media_at:])


def _introduce_media(media: Media) -> Prompt:
    """Return media with the text around them, up to the first character of the question."""
    if media.kind == "audio":
        return (*format_media(media), " ")
    if media.placeholders == ("video",) and not media.timestamps:
        return ("<Video>", Mark.MEDIA, "</Video> ")
    return format_media(media)


def _encode_labeled(tokenizer: Tokenizer, segments: LabeledPrompt, media_length: int, max_length: int) -> TrainingText:
    """Tokenize segments as one prompt, because tokens may span them, and label the tokens of labeled segments.

    The boundary after a segment is the number of ids that the prompt up to it and the full prompt have in common. A
    token across a boundary, which LLaMA's tokenizers never make, belongs to the later segment.
    """
    full = encode_prompt(tokenizer, tuple(segment for segment, _ in segments), [media_length])
    labeled = np.zeros(len(full.ids), bool)
    prompt: Prompt = ()
    start = 0
    for is_labeled, group in itertools.groupby(segments, key=lambda pair: pair[1]):
        prompt += tuple(segment for segment, _ in group)
        ids = encode_prompt(tokenizer, prompt, [media_length] * prompt.count(Mark.MEDIA)).ids
        boundary = max(start, _common_prefix_length(ids, full.ids))
        labeled[start:boundary] = is_labeled
        start = boundary
        if start >= max_length:
            break
    labels = np.where(labeled, full.ids, np.int32(IGNORE_INDEX))
    return TrainingText(full.ids[:max_length], full.is_media[:max_length], labels[:max_length])


def _common_prefix_length(left: Int32[np.ndarray, "n"], right: Int32[np.ndarray, "m"]) -> int:
    """Return the length of the longest common prefix."""
    shortest = min(len(left), len(right))
    different = np.flatnonzero(left[:shortest] != right[:shortest])
    return int(different[0]) if len(different) else shortest
