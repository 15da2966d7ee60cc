"""Texts to learn from: token ids, where media tokens go, and which tokens are labels.

Two layouts, both the reference's. A caption follows media, bare or after an instruction, and only it is learned. A
conversation is learned where the model speaks, with the signs that end its turns. Everything that people wrote is
text: a literal `</s>` or `<ImageHere>` in it is letters here, while the reference takes it for the token.
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

IGNORE_INDEX = -100  # the label of a token that is not learned
PLAIN_TEMPLATE = "plain"  # the template of captions without an instruction: stage 1

# What the reference asks for in its alignment stage (prompts/alignment_image.txt), of pictures and of videos.
ALIGNMENT_INSTRUCTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)

_PUNCTUATION = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingText:
    """Token ids, 0 where a media token goes; where those are; and each token itself where it is learned.

    Labels are IGNORE elsewhere, and not shifted: what is learned is to say label i after the tokens before i.
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
    """A BOS, media, and a caption with its end, which are learned (reference: models/video_llama.py).

    Args:
        media: of what kind they are; times play no part. As in the reference a video is asked about as an image is.
        instruction: what the caption answers; None: it follows the media directly and ends as BARE does, whatever the
            template.
        media_length: how many tokens the media take.
        max_length: of the caption with its end, in tokens; a longer one loses its end. Tokenised apart from the prompt.
    """
    if instruction is None:
        template = find_caption_template(PLAIN_TEMPLATE)
        prompt: Prompt = (Mark.MEDIA,)
    else:
        before, after = template.wrap
        introduction = _introduction(media if media.kind == "audio" else Media("image"))
        prompt = (*before, *introduction, instruction, *after)
    asked = encode_prompt(tokenizer, prompt, [media_length])
    learned = encode_prompt(tokenizer, (caption, *template.end), [], start=False).ids[:max_length]
    return TrainingText(
        ids=np.concatenate([asked.ids, learned]),
        is_media=np.concatenate([asked.is_media, np.zeros(len(learned), bool)]),
        labels=np.concatenate([np.full(len(asked.ids), IGNORE_INDEX, np.int32), learned]),
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
    """Questions and answers about media, the answers being learned (reference: datasets/video_instruct_dataset.py).

    Args:
        turns: questions, each with its answer.
        media: what the first question is about; one sense, so `media.sound` must be off. A video without `seconds` has
            no message about times.
        media_at: where in the first question the media stand, in characters.
        media_length: how many tokens the media take.
        max_length: of the whole in tokens, with the start token and the media. What is beyond is cut off, were it
            media tokens; there may be no label left.

    Raises:
        DataError: there are no turns.
    """
    if not turns:
        raise DataError("a conversation without turns: there is nothing to learn from it")
    parts = template.opening
    for number, (question, answer) in enumerate(turns):
        asked = (*template.next_question, question) if number else _first_question(question, media, media_at)
        parts += tuple((part, UNLABELED) for part in (*asked, *template.question_end))
        parts += tuple((part, LABELED) for part in (*template.answer_start, answer, *template.answer_end))
    return _encode(tokenizer, parts, media_length, max_length)


def clean_caption(caption: str, max_words: int = 50) -> str:
    """A caption in lower case, its punctuation turned into spaces, cut to so many words.

    Equals the reference's processors/blip_processors.py, which uses it on WebVid's captions only.
    """
    text = re.sub(r"\s{2,}", " ", caption.lower().translate(_PUNCTUATION))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def _first_question(question: str, media: Media, media_at: int) -> Prompt:
    if media.kind == "image":
        return (question[:media_at], "<Image>", Mark.MEDIA, "</Image>", question[media_at:])
    return (question[:media_at], *_introduction(media), question[media_at:])


def _introduction(media: Media) -> Prompt:
    """The words around media, up to the first letter of the question."""
    if media.kind == "audio":
        return (*format_media(media), " ")
    if media.placeholders == ("video",) and not media.timestamps:
        return ("<Video>", Mark.MEDIA, "</Video> ")
    return format_media(media)


def _encode(tokenizer: Tokenizer, parts: LabeledPrompt, media_length: int, max_length: int) -> TrainingText:
    """Ids of parts as one prompt, since a tokenizer sees across their seams, and which of them are learned.

    A seam is found as the number of ids that the prompt up to it begins with and that the whole begins with too. So a
    token across a seam, which LLaMA's tokenizers never make, belongs to what comes after.
    """
    whole = encode_prompt(tokenizer, tuple(part for part, _ in parts), [media_length])
    learned = np.zeros(len(whole.ids), bool)
    prompt: Prompt = ()
    done = 0
    for is_learned, group in itertools.groupby(parts, key=lambda pair: pair[1]):
        prompt += tuple(part for part, _ in group)
        ids = encode_prompt(tokenizer, prompt, [media_length] * prompt.count(Mark.MEDIA)).ids
        seam = max(done, _common_length(ids, whole.ids))
        learned[done:seam] = is_learned
        done = seam
        if done >= max_length:
            break
    labels = np.where(learned, whole.ids, np.int32(IGNORE_INDEX))
    return TrainingText(whole.ids[:max_length], whole.is_media[:max_length], labels[:max_length])


def _common_length(left: Int32[np.ndarray, "n"], right: Int32[np.ndarray, "m"]) -> int:
    """How many ids both begin with."""
    shortest = min(len(left), len(right))
    different = np.flatnonzero(left[:shortest] != right[:shortest])
    return int(different[0]) if len(different) else shortest
