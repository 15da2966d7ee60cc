"""Build prompts: convert conversations about media to text and token ids, and generated token ids to answers.

Texts and ids equal the reference's (its `conversation_video.py`) for the templates vicuna and llama_2. Docstrings
say where the reference has no wording. Templates are in `templates.py`.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32

from vllama_jax.errors import ConfigError
from vllama_jax.text.templates import ChatTemplate, Mark, Prompt, Segment, Token, find_template, special_tokens
from vllama_jax.text.tokenizer import Tokenizer

DEFAULT_SYSTEM = (
    "You are able to understand the visual content that the user provides. "
    "Follow the instructions carefully and explain your answers in detail."
)


@dataclasses.dataclass(frozen=True)
class Media:
    """A media file in a conversation.

    Attributes:
        kind: The kind of media.
        with_audio: Whether the audio of a video is used too.
        timestamps: Of a video's sampled frames, in seconds.
        time_range: Of a segment of a file, its start and end in seconds.
        segments: The segments of a file that is encoded in several; the other fields but `kind` are theirs.
    """

    kind: Literal["video", "image", "audio"]
    with_audio: bool = False
    timestamps: tuple[float, ...] = ()
    time_range: tuple[float, float] | None = None
    segments: tuple["Media", ...] = ()

    @property
    def placeholders(self) -> tuple[str, ...]:
        """The kind of each media placeholder in the prompt, in order: audio precedes video."""
        if self.segments:
            return tuple(itertools.chain.from_iterable(segment.placeholders for segment in self.segments))
        return ("audio", self.kind) if self.with_audio and self.kind == "video" else (self.kind,)


@dataclasses.dataclass(frozen=True)
class Turn:
    """Media, a question and its answer.

    Attributes:
        media: The files that were added before the question.
        question: The question; None until it is asked.
        answer: The answer; None until it is generated.
        ended_by_eos: Whether the model ended the answer with its EOS.
    """

    media: tuple[Media, ...] = ()
    question: str | None = None
    answer: str | None = None
    ended_by_eos: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns and their prompt template. Immutable: each method returns a new conversation.

    Attributes:
        template: The chat form of the prompt template.
        audio_branch: Whether the model has an audio branch.
        system: The system prompt; None for `default_system_prompt`.
        turns: The turns so far.
    """

    template: ChatTemplate
    audio_branch: bool
    system: str | None = None
    turns: tuple[Turn, ...] = ()

    def add(self, media: Media) -> "Conversation":
        """Add a media file before the next question."""
        finished, turn = self._open_turn()
        return dataclasses.replace(self, turns=(*finished, dataclasses.replace(turn, media=(*turn.media, media))))

    def ask(self, question: str) -> "Conversation":
        """Add a question, about all media and turns before it."""
        finished, turn = self._open_turn()
        return dataclasses.replace(self, turns=(*finished, dataclasses.replace(turn, question=question)))

    def answer(self, text: str, ended_by_eos: bool = False) -> "Conversation":
        """Add the answer to the last question.

        Args:
            text: The answer.
            ended_by_eos: Whether an EOS follows it in later prompts (`decode_past_answer`).

        Raises:
            ValueError: No question is open.
        """
        if not self.turns or self.turns[-1].question is None or self.turns[-1].answer is not None:
            raise ValueError("there is no question to answer: ask one first")
        turn = dataclasses.replace(self.turns[-1], answer=text, ended_by_eos=ended_by_eos)
        return dataclasses.replace(self, turns=(*self.turns[:-1], turn))

    def undo(self) -> "Conversation":
        """Remove the last question and its answer. Files that were added before or after it stay, for the next one.

        Raises:
            ValueError: There is no question.
        """
        last = next((i for i in reversed(range(len(self.turns))) if self.turns[i].question is not None), None)
        if last is None:
            raise ValueError("there is no question to undo")
        media = tuple(media for turn in self.turns[last:] for media in turn.media)
        return dataclasses.replace(self, turns=(*self.turns[:last], *([Turn(media)] if media else [])))

    def _open_turn(self) -> tuple[tuple[Turn, ...], Turn]:
        """Return the finished turns, and the turn of the next message."""
        if not self.turns or self.turns[-1].answer is not None:
            return self.turns, Turn()
        if self.turns[-1].question is not None:
            raise ValueError("the last question has no answer yet: add its answer first")
        return self.turns[:-1], self.turns[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedPrompt:
    """Token ids of a prompt.

    Attributes:
        ids: Token ids, 0 at placeholders.
        is_media: Whether each position is a placeholder.
    """

    ids: Int32[np.ndarray, "n"]
    is_media: Bool[np.ndarray, "n"]


def start_conversation(template: str, audio_branch: bool, system: str | None = None) -> Conversation:
    """Create an empty conversation.

    Args:
        template: The name of the prompt template.
        audio_branch: Whether the model has an audio branch.
        system: The system prompt; None for `default_system_prompt`.

    Raises:
        ConfigError: There is no such template, or it does not support a system prompt.
    """
    chosen = find_template(template)
    if system and chosen.system is None:
        raise ConfigError(f"the prompt template {template!r} does not support a system prompt: omit it")
    return Conversation(template=chosen, audio_branch=audio_branch, system=system)


def check_special_tokens(form: object, tokenizer: Tokenizer, name: str) -> None:
    """Check that a tokenizer has all special tokens of a template.

    Args:
        form: A form of the template: chat, caption or conversation.
        tokenizer: The model's tokenizer.
        name: The template's name, for the message.

    Raises:
        ConfigError: A special token is missing.
    """
    missing = [token.text for token in special_tokens(form) if tokenizer.special_token_id(token.text) is None]
    if missing:
        raise ConfigError(
            f"the tokenizer has no special token {missing[0]!r}, which the prompt template {name!r} needs: "
            "choose another template"
        )


def default_system_prompt(audio_branch: bool, media: Media | None) -> str:
    """Return the system prompt of the reference's demos.

    A model without an audio branch always gets DEFAULT_SYSTEM; one with an audio branch gets it only for images.
    If audio is used, the system prompt is empty. Without media, which no demo allows, it is empty too.

    Args:
        audio_branch: Whether the model has an audio branch.
        media: The last media file of the conversation.
    """
    if media is None or "audio" in media.placeholders:
        return ""
    return DEFAULT_SYSTEM if media.kind == "image" or not audio_branch else ""


def format_timestamps(timestamps: Sequence[float]) -> str:
    """Return the sentence with the timestamps of a video's frames in seconds, followed by a space."""
    times = ", ".join(str(round(float(second), 1)) for second in timestamps)
    return f"The video contains {len(timestamps)} frames sampled at {times} seconds. "


def format_media(media: Media) -> Prompt:
    """Return the text and placeholders of a media file. The runs of spaces are the reference's.

    The reference has no wording for audio alone; this is the audio half of its sentence for both. It has none for
    segments either.
    """
    if media.segments:
        return _merge_texts(itertools.chain.from_iterable(map(_format_segment, media.segments)))
    audio_intro = "Close your eyes, open your ears and you imagine only based on the sound that: "
    if media.placeholders == ("audio", "video"):
        video_intro = "." + " " * 17 + "Close your ears, open your eyes and you see that <Video>"
        end = "</Video>." + " " * 18 + "Now answer my question based on what you have just seen and heard."
        return (audio_intro, Mark.MEDIA, video_intro, Mark.MEDIA, end)
    if media.kind == "audio":
        return (audio_intro, Mark.MEDIA, "." + " " * 18 + "Now answer my question based on what you have just heard.")
    if media.kind == "video":
        return ("<Video>", Mark.MEDIA, "</Video> " + format_timestamps(media.timestamps))
    return ("<Image>", Mark.MEDIA, "</Image> ")


def _format_segment(segment: Media) -> Prompt:
    """Return the text and placeholders of a segment, such as "From 60.0 to 120.0 seconds: <Video>…</Video> "."""
    start, end = segment.time_range or (0.0, 0.0)
    audio = ("<Audio>", Mark.MEDIA, "</Audio> ") if "audio" in segment.placeholders else ()
    video = ("<Video>", Mark.MEDIA, "</Video> ", format_timestamps(segment.timestamps)) if segment.timestamps else ()
    return (f"From {start:.1f} to {end:.1f} seconds: ", *audio, *video)


def build_prompt(conversation: Conversation) -> Prompt:
    """Build the prompt of all turns.

    Returns:
        Texts, marks and special tokens. After an unanswered question, they end with the generation prompt.
    """
    template, turns = conversation.template, conversation.turns
    prompt: list[Segment] = [*_build_opening(conversation)]
    for i, turn in enumerate(turns):
        prompt += [
            *(template.turn_separator if i else ()),
            *_build_user_message(template, turn),
            *template.generation_prompt,
        ]
        if turn.answer is not None:  # training has no prefix directly after media
            prompt += [template.answer_prefix if template.generation_prompt or turn.question else "", turn.answer]
            prompt += [Mark.EOS] if turn.ended_by_eos else []
    return _merge_texts(prompt)


def render(conversation: Conversation) -> str:
    """Return the prompt as one string, to be read by people.

    Do not tokenize it: `<ImageHere>` may be a placeholder or a user's text.
    """
    return "".join(map(_segment_text, build_prompt(conversation)))


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, media_lengths: Sequence[int]
) -> TokenizedPrompt:
    """Tokenize a conversation: `encode_prompt` of `build_prompt`.

    Args:
        conversation: The conversation.
        tokenizer: The model's tokenizer.
        media_lengths: Number of media tokens of each placeholder, in the order of turns, files and
            `Media.placeholders`.
    """
    return encode_prompt(tokenizer, build_prompt(conversation), media_lengths)


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt, media_lengths: Sequence[int], *, add_bos: bool = True
) -> TokenizedPrompt:
    """Tokenize a prompt: its BOS, then each text by itself, as in the reference.

    Args:
        tokenizer: The model's tokenizer, which determines whether there is a BOS.
        prompt: Texts, marks and special tokens.
        media_lengths: Number of media tokens of each placeholder, in order.
        add_bos: Whether to add the BOS; False if the prompt continues another one.

    Raises:
        ValueError: The number of lengths is not the number of placeholders.
        ConfigError: The tokenizer does not have a special token of the prompt.
    """
    count = prompt.count(Mark.MEDIA)
    if count != len(media_lengths):
        raise ValueError(f"the prompt has {count} media placeholders, but {len(media_lengths)} lengths were given")
    lengths = iter(media_lengths)
    ids = tokenizer.bos_ids if add_bos else []
    is_media = [False] * len(ids)
    for segment in _merge_texts(prompt):
        segment_ids = [0] * next(lengths) if segment is Mark.MEDIA else _encode_segment(tokenizer, segment)
        ids += segment_ids
        is_media += [segment is Mark.MEDIA] * len(segment_ids)
    return TokenizedPrompt(np.array(ids, np.int32), np.array(is_media, bool))


def encode_answer(tokenizer: Tokenizer, conversation: Conversation, answer: str) -> list[int]:
    """Return the token ids of an answer to the last question of a conversation.

    They are those that follow the prompt in the ids of both together, as tokens may contain the space between them.
    """

    def encode(one: Conversation) -> list[int]:
        last = tuple(itertools.takewhile(lambda segment: segment is not Mark.MEDIA, reversed(build_prompt(one))))
        return encode_prompt(tokenizer, last[::-1], (), add_bos=False).ids.tolist()

    prompt, both = encode(conversation), encode(conversation.answer(answer))
    return both[len(prompt) :] if both[: len(prompt)] == prompt else tokenizer.encode(answer, special=False)


def stop_sequences(tokenizer: Tokenizer, template: ChatTemplate) -> list[tuple[int, ...]]:
    """Return the id sequences that end an answer, in addition to those in `tokenizer.eos_ids`.

    The ids of a stop string depend on the text before it: LLaMA's "###" is 835, or 2277 and 29937. In some
    vocabularies it may merge with that text, so `stream_answer` searches the text too.
    """
    sequences: set[tuple[int, ...]] = set()
    for stop in (template.stop, *template.more_stops):
        if not isinstance(stop, str):
            sequences |= {(token_id,) for token_id in _encode_segment(tokenizer, stop)}
            continue
        sequences.add(tuple(tokenizer.encode(stop, special=False)))
        for context in ("\n", ".", "a"):
            before = tokenizer.encode(context, special=False)
            both = tokenizer.encode(context + stop, special=False)
            if both[: len(before)] == before:
                sequences.add(tuple(both[len(before) :]))
    return sorted(
        ids for ids in sequences if not any(ids != other and ids[-len(other) :] == other for other in sequences)
    )


def decode_answer(tokenizer: Tokenizer, template: ChatTemplate, ids: Iterable[int]) -> str:
    """Decode an answer.

    Args:
        tokenizer: The model's tokenizer.
        template: The chat form of the prompt template.
        ids: Generated ids. They may start with a dummy BOS; ids after an end token are ignored.

    Returns:
        The answer, without the stop string, the assistant's role, and white space around it.
    """
    return clean_answer(template, tokenizer.decode(_truncate_at_eos(tokenizer, template, ids), skip_special=True))


def decode_past_answer(tokenizer: Tokenizer, template: ChatTemplate, ids: Sequence[int]) -> tuple[str, bool]:
    """Decode an answer for the prompts of later turns.

    The original truncates an answer at the template's stop string and strips it, so it keeps an EOS that ended the
    answer (of Vicuna), and the space before one. There is no EOS if a stop string or the limit of new tokens ended the
    answer, or if the template itself puts one between turns (LLaMA-2, ChatML).

    Args:
        tokenizer: The model's tokenizer.
        template: The chat form of the prompt template.
        ids: The generated ids.

    Returns:
        The text, and whether the model's EOS follows it.
    """
    answer_ids = _truncate_at_eos(tokenizer, template, ids)
    text = tokenizer.decode(answer_ids, skip_special=True)
    ended_by_eos = (
        len(answer_ids) < len(ids) and isinstance(template.stop, str) and _truncate_at_stop(template, text) == text
    )
    text = _extract_answer(template, text)
    return (text.lstrip() if ended_by_eos else text.strip()), ended_by_eos


def clean_answer(template: ChatTemplate, text: str) -> str:
    """Remove the stop string and all after it, all up to the last mention of the assistant's role, and white space."""
    return _extract_answer(template, text).strip()


def stream_answer(tokenizer: Tokenizer, template: ChatTemplate, batches: Iterable[Sequence[int]]) -> Iterator[str]:
    """Decode an answer while its ids are generated.

    Text is withheld while it may be the start of a stop string, of the role or of a character. The texts joined equal
    `decode_answer` of all ids, except if the role is mentioned again after the first text was yielded: then the text
    before it remains.

    Args:
        tokenizer: The model's tokenizer.
        template: The chat form of the prompt template.
        batches: Batches of generated ids. No more batches are taken once the answer has ended.

    Yields:
        The new text.
    """
    decoder = AnswerDecoder(tokenizer, template)
    for batch in batches:
        if text := decoder.add(batch):
            yield text
        if decoder.has_ended:
            return
    if text := decoder.add((), is_last=True):
        yield text


class AnswerDecoder:
    """Decodes an answer whose ids arrive in batches. See `stream_answer`.

    Args:
        tokenizer: The model's tokenizer.
        template: The chat form of the prompt template.

    Attributes:
        text: The text so far.
        has_ended: Whether an end token or a stop string was found. Later ids are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self._tokenizer, self._template = tokenizer, template
        self._ids: list[int] = []
        self._start = 0
        self.text = ""
        self.has_ended = False

    def add(self, ids: Iterable[int], *, is_last: bool = False) -> str:
        """Add generated ids, and return the new text.

        Args:
            ids: The ids.
            is_last: Whether no more ids follow.
        """
        if self.has_ended:
            return ""
        self._ids.extend(ids)
        answer_ids = _truncate_at_eos(self._tokenizer, self._template, self._ids)
        is_last = is_last or len(answer_ids) < len(self._ids)
        decode = self._tokenizer.decode_stable_prefix
        text = self._tokenizer.decode(answer_ids, skip_special=True) if is_last else decode(answer_ids)
        truncated = _truncate_at_stop(self._template, text)
        self.has_ended = is_last or truncated != text
        text = truncated if self.has_ended else _withhold_partial_stop(self._template, text)
        if not self.text:
            self._start = _find_answer_start(self._template, text)
        text = text[self._start :].strip()
        new = text[len(self.text) :]
        self.text += new
        return new


def _build_opening(conversation: Conversation) -> Prompt:
    """Return the text before the first user message, with the system prompt if there is one."""
    template = conversation.template
    media = [file for turn in conversation.turns for file in turn.media]
    default = default_system_prompt(conversation.audio_branch, media[-1] if media else None)
    system = default if conversation.system is None else conversation.system
    if template.system is None or not system:
        return template.opening
    before, after = template.system
    return (*before, system, *after)


def _build_user_message(template: ChatTemplate, turn: Turn) -> list[Segment]:
    """Build one message of media and question. The reference gives each file but the last its own message."""
    segments: list[Segment] = []
    for i, media in enumerate(turn.media):
        formatted = format_media(media) if template.media_tags else (Mark.MEDIA,) * len(media.placeholders)
        segments += [template.media_separator if i else "", *formatted]
    space = " " if turn.media and template.media_tags else ""
    return segments if turn.question is None else [*segments, space, turn.question]


def _merge_texts(segments: Iterable[Segment]) -> Prompt:
    """Merge adjacent texts, because tokens may span them, and drop empty texts."""
    joined: list[Segment] = []
    for segment in segments:
        if isinstance(segment, str) and joined and isinstance(joined[-1], str):
            joined[-1] += segment
        elif segment:
            joined.append(segment)
    return tuple(joined)


def _encode_segment(tokenizer: Tokenizer, segment: Segment) -> list[int]:
    """Return the ids of a text, a mark other than MEDIA, or a special token."""
    if isinstance(segment, str):
        return tokenizer.encode(segment, special=False)
    if isinstance(segment, Mark):
        return tokenizer.bos_ids if segment is Mark.BOS else [tokenizer.eos_id]
    token_id = tokenizer.special_token_id(segment.text)
    if token_id is None:
        raise ConfigError(f"the tokenizer has no special token {segment.text!r}: choose another prompt template")
    return [token_id]


def _segment_text(segment: Segment) -> str:
    if isinstance(segment, Mark):
        return segment.value
    return segment.text if isinstance(segment, Token) else segment


def _extract_answer(template: ChatTemplate, text: str) -> str:
    text = _truncate_at_stop(template, text)
    return text[_find_answer_start(template, text) :]


def _truncate_at_stop(template: ChatTemplate, text: str) -> str:
    for stop in (template.stop, *template.more_stops):
        text = text.split(_segment_text(stop))[0]
    return text


def _find_answer_start(template: ChatTemplate, text: str) -> int:
    index = text.rfind(template.role) if template.role else -1
    return 0 if index < 0 else index + len(template.role)


def _truncate_at_eos(tokenizer: Tokenizer, template: ChatTemplate, ids: Iterable[int]) -> list[int]:
    end_ids = {*tokenizer.eos_ids}
    if isinstance(template.stop, Token):
        end_ids |= {*_encode_segment(tokenizer, template.stop)}
    return list(itertools.takewhile(lambda token_id: token_id not in end_ids, map(int, ids)))


def _withhold_partial_stop(template: ChatTemplate, text: str) -> str:
    """Remove the longest suffix that is the start of the stop string or of the role."""
    marks = (_segment_text(template.stop), *template.more_stops, template.role)
    withheld = max(n for mark in marks for n in range(len(mark) or 1) if text.endswith(mark[:n]))
    return text[: len(text) - withheld]
