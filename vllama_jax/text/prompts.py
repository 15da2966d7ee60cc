"""A conversation about media in, prompt text and token ids out; generated ids in, the answer's text out.

Strings and ids equal the reference's (its `conversation_video.py`) for the vicuna and llama_2 templates; where the
reference has no wording, the docstring says so. Templates are in `templates.py`.
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
    """One file of a conversation. `sound`: whether a video's sound is heard too. `seconds`: when its frames were."""

    kind: Literal["video", "image", "audio"]
    with_audio: bool = False
    timestamps: tuple[float, ...] = ()

    @property
    def placeholders(self) -> tuple[str, ...]:
        """What goes into its places in the prompt, in order: sound comes before sight."""
        return ("audio", self.kind) if self.with_audio and self.kind == "video" else (self.kind,)


@dataclasses.dataclass(frozen=True)
class Turn:
    """Media, then a question, then its answer; None while it has not come. ended: the model ended it by its EOS."""

    media: tuple[Media, ...] = ()
    question: str | None = None
    answer: str | None = None
    ended: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns under a template. Immutable: each method returns the conversation that follows.

    `audio_branch` says whether the model can hear, `system` is the caller's own system text (None: see `system_text`).
    """

    template: ChatTemplate
    audio_branch: bool
    system: str | None = None
    turns: tuple[Turn, ...] = ()

    def add(self, media: Media) -> "Conversation":
        """Shows the model one more file, before the next question."""
        past, turn = self._open_turn()
        return dataclasses.replace(self, turns=(*past, dataclasses.replace(turn, media=(*turn.media, media))))

    def ask(self, question: str) -> "Conversation":
        """Asks the next question, about the files added before it and all that was said."""
        past, turn = self._open_turn()
        return dataclasses.replace(self, turns=(*past, dataclasses.replace(turn, question=question)))

    def answer(self, text: str, ended: bool = False) -> "Conversation":
        """Keep the answer to the last question, and whether an EOS follows it in later prompts (`past_answer`)."""
        if not self.turns or self.turns[-1].question is None or self.turns[-1].answer is not None:
            raise ValueError("there is no question to answer")
        turn = dataclasses.replace(self.turns[-1], answer=text, ended=ended)
        return dataclasses.replace(self, turns=(*self.turns[:-1], turn))

    def _open_turn(self) -> tuple[tuple[Turn, ...], Turn]:
        """The finished turns, and the one that a next message belongs to."""
        if not self.turns or self.turns[-1].answer is not None:
            return self.turns, Turn()
        if self.turns[-1].question is not None:
            raise ValueError("the last question has no answer yet")
        return self.turns[:-1], self.turns[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedPrompt:
    """Token ids, 0 where a media token goes, and where those are."""

    ids: Int32[np.ndarray, "n"]
    is_media: Bool[np.ndarray, "n"]


def start_conversation(template: str, audio_branch: bool, system: str | None = None) -> Conversation:
    """An empty conversation.

    Raises:
        ConfigError: there is no such template, or it has no place for a system text.
    """
    chosen = find_template(template)
    if system and chosen.system is None:
        raise ConfigError(f"the prompt template {template!r} has no place for a system text: leave it out")
    return Conversation(template=chosen, audio_branch=audio_branch, system=system)


def check_special_tokens(form: object, tokenizer: Tokenizer, name: str) -> None:
    """Raise ConfigError where a form of the template `name` needs a special token that a tokenizer does not have."""
    missing = [token.text for token in special_tokens(form) if tokenizer.special_token_id(token.text) is None]
    if missing:
        raise ConfigError(
            f"the tokenizer has no special token {missing[0]!r}, which the prompt template {name!r} needs: "
            "choose another template"
        )


def default_system_prompt(audio_branch: bool, media: Media | None) -> str:
    """The system text of the reference's demos, which the file shown last decides.

    A picture-only model gets the long sentence always, one with the audio branch only for images. Sound in use empties
    it. Without media (which no demo allows) it is empty.
    """
    if media is None or "audio" in media.placeholders:
        return ""
    return DEFAULT_SYSTEM if media.kind == "image" or not audio_branch else ""


def format_timestamps(timestamps: Sequence[float]) -> str:
    """When the frames of a video were, with the space that follows."""
    times = ", ".join(str(round(float(second), 1)) for second in timestamps)
    return f"The video contains {len(timestamps)} frames sampled at {times} seconds. "


def format_media(media: Media) -> Prompt:
    """The words around a file. The runs of spaces are the reference's own.

    The reference never has sound alone; its wording here is the sound half of the sentence for both.
    """
    hear = "Close your eyes, open your ears and you imagine only based on the sound that: "
    if media.placeholders == ("audio", "video"):
        see = "." + " " * 17 + "Close your ears, open your eyes and you see that <Video>"
        end = "</Video>." + " " * 18 + "Now answer my question based on what you have just seen and heard."
        return (hear, Mark.MEDIA, see, Mark.MEDIA, end)
    if media.kind == "audio":
        return (hear, Mark.MEDIA, "." + " " * 18 + "Now answer my question based on what you have just heard.")
    if media.kind == "video":
        return ("<Video>", Mark.MEDIA, "</Video> " + format_timestamps(media.timestamps))
    return ("<Image>", Mark.MEDIA, "</Image> ")


def build_prompt(conversation: Conversation) -> Prompt:
    """All turns; after the last question, the cue that the answer follows."""
    template, turns = conversation.template, conversation.turns
    prompt: list[Segment] = [*_opening(conversation)]
    for i, turn in enumerate(turns):
        prompt += [*(template.turn_separator if i else ()), *_user_message(template, turn), *template.generation_prompt]
        if turn.answer is not None:  # what follows media directly was trained without a gap
            prompt += [template.answer_prefix if template.generation_prompt or turn.question else "", turn.answer]
            prompt += [Mark.EOS] if turn.ended else []
    return _join_texts(prompt)


def render(conversation: Conversation) -> str:
    """The prompt as one string, for people and tests: `<ImageHere>` in it may be a place for media or a user's text."""
    return "".join(map(_text_of, build_prompt(conversation)))


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, media_lengths: Sequence[int]
) -> TokenizedPrompt:
    """Token ids of `build_prompt`; see `encode_prompt`. Media come in the order of turns, files and `Media.slots`."""
    return encode_prompt(tokenizer, build_prompt(conversation), media_lengths)


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt, media_lengths: Sequence[int], *, start: bool = True
) -> TokenizedPrompt:
    """Token ids of a prompt: its BOS, then each text encoded by itself, as in the reference.

    Args:
        tokenizer: Says whether there is a BOS.
        prompt: Texts, marks and special tokens.
        media_lengths: How many tokens go into each place for media, in order of appearance.
        start: False for what follows another prompt, without a BOS.

    Raises:
        ValueError: More or fewer lengths than places.
        ConfigError: The tokenizer does not have a special token of the prompt.
    """
    places = prompt.count(Mark.MEDIA)
    if places != len(media_lengths):
        raise ValueError(f"the prompt has {places} places for media, but {len(media_lengths)} lengths were given")
    lengths = iter(media_lengths)
    ids = tokenizer.bos_ids if start else []
    is_media = [False] * len(ids)
    for part in _join_texts(prompt):
        new = [0] * next(lengths) if part is Mark.MEDIA else _part_ids(tokenizer, part)
        ids += new
        is_media += [part is Mark.MEDIA] * len(new)
    return TokenizedPrompt(np.array(ids, np.int32), np.array(is_media, bool))


def stop_sequences(tokenizer: Tokenizer, template: ChatTemplate) -> list[tuple[int, ...]]:
    """The ids that end an answer when they are the last ones generated, beside those in `tokenizer.eos_ids`.

    A stop string has other ids by itself than after other text (LLaMA's "###" is 835, or 2277 and 29937), and in some
    vocabularies it may melt into what precedes it: `stream_answer` looks at the text too.
    """
    if not isinstance(template.stop, str):
        return [(stop,) for stop in _part_ids(tokenizer, template.stop)]
    found = {tuple(tokenizer.encode(template.stop, special=False))}
    for context in ("\n", ".", "a"):
        before = tokenizer.encode(context, special=False)
        both = tokenizer.encode(context + template.stop, special=False)
        if both[: len(before)] == before:
            found.add(tuple(both[len(before) :]))
    return sorted(ids for ids in found if not any(ids != other and ids[-len(other) :] == other for other in found))


def decode_answer(tokenizer: Tokenizer, template: ChatTemplate, ids: Iterable[int]) -> str:
    """The answer in generated ids, the dummy start token allowed; what follows an end token is left out."""
    return clean_answer(template, tokenizer.decode(_before_end(tokenizer, template, ids), skip_special=True))


def decode_past_answer(tokenizer: Tokenizer, template: ChatTemplate, ids: Sequence[int]) -> tuple[str, bool]:
    """An answer as the prompts of later turns have it: its text, and whether the model's EOS follows.

    The original cuts an answer at the template's stop and strips it, and so keeps an EOS that ended it (of Vicuna), and
    the space before one. There is none where a stop string or the limit of new tokens ended the answer, nor where the
    template itself puts one between turns (LLaMA-2, ChatML).
    """
    until_end = _before_end(tokenizer, template, ids)
    text = tokenizer.decode(until_end, skip_special=True)
    ended = len(until_end) < len(ids) and isinstance(template.stop, str) and template.stop not in text
    text = _cut_answer(template, text)
    return (text.lstrip() if ended else text.strip()), ended


def clean_answer(template: ChatTemplate, text: str) -> str:
    """Cuts a text at the stop string and at the last mention of the assistant's role, and strips it."""
    return _cut_answer(template, text).strip()


def stream_answer(tokenizer: Tokenizer, template: ChatTemplate, batches: Iterable[Sequence[int]]) -> Iterator[str]:
    """The answer in pieces while its ids are generated. Stops taking batches when the answer has ended.

    A piece is held back while it may be the beginning of a stop string, a role or a character. The pieces joined are
    `decode_answer` of the ids, but where the role is named again once text was shown: that stays.
    """
    ids: list[int] = []
    shown = start = 0
    for batch in itertools.chain(batches, [None]):
        ids.extend([] if batch is None else batch)
        until_end = _before_end(tokenizer, template, ids)
        ended = batch is None or len(until_end) < len(ids)
        text = tokenizer.decode(until_end, skip_special=True) if ended else tokenizer.decode_stable_prefix(until_end)
        kept = _before_stop(template, text)
        ended = ended or kept != text
        text = kept if ended else _without_beginning_of_mark(template, text)
        if not shown:
            start = _start_of_answer(template, text)
        text = text[start:].strip()
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
        if ended:
            return


def _opening(conversation: Conversation) -> Prompt:
    """What precedes the first user message: the system text with what is around it, where there is one."""
    template = conversation.template
    shown = [media for turn in conversation.turns for media in turn.media]
    automatic = default_system_prompt(conversation.audio_branch, shown[-1] if shown else None)
    system = automatic if conversation.system is None else conversation.system
    if template.system is None or not system:
        return template.opening
    before, after = template.system
    return (*before, system, *after)


def _user_message(template: ChatTemplate, turn: Turn) -> list[Segment]:
    """Media and question in one message; the reference gives each file but the last a message of its own."""
    parts: list[Segment] = []
    for i, media in enumerate(turn.media):
        words = format_media(media) if template.media_tags else (Mark.MEDIA,) * len(media.placeholders)
        parts += [template.media_separator if i else "", *words]
    gap = " " if turn.media and template.media_tags else ""
    return parts if turn.question is None else [*parts, gap, turn.question]


def _join_texts(parts: Iterable[Segment]) -> Prompt:
    """Neighbouring texts as one, since a tokenizer sees across their seams; no empty texts."""
    joined: list[Segment] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part:
            joined.append(part)
    return tuple(joined)


def _part_ids(tokenizer: Tokenizer, part: Segment) -> list[int]:
    """The ids of a text, of a mark other than MEDIA, or of a special token."""
    if isinstance(part, str):
        return tokenizer.encode(part, special=False)
    if isinstance(part, Mark):
        return tokenizer.bos_ids if part is Mark.BOS else [tokenizer.eos_id]
    found = tokenizer.special_token_id(part.text)
    if found is None:
        raise ConfigError(f"the tokenizer has no special token {part.text!r}: choose another prompt template")
    return [found]


def _text_of(part: Segment) -> str:
    if isinstance(part, Mark):
        return part.value
    return part.text if isinstance(part, Token) else part


def _cut_answer(template: ChatTemplate, text: str) -> str:
    text = _before_stop(template, text)
    return text[_start_of_answer(template, text) :]


def _before_stop(template: ChatTemplate, text: str) -> str:
    return text.split(_text_of(template.stop))[0]


def _start_of_answer(template: ChatTemplate, text: str) -> int:
    found = text.rfind(template.role) if template.role else -1
    return 0 if found < 0 else found + len(template.role)


def _before_end(tokenizer: Tokenizer, template: ChatTemplate, ids: Iterable[int]) -> list[int]:
    ends = {*tokenizer.eos_ids}
    if isinstance(template.stop, Token):
        ends |= {*_part_ids(tokenizer, template.stop)}
    return list(itertools.takewhile(lambda token_id: token_id not in ends, map(int, ids)))


def _without_beginning_of_mark(template: ChatTemplate, text: str) -> str:
    """The text less the longest end that a stop string or the role begins with."""
    marks = (_text_of(template.stop), template.role)
    held = max(n for mark in marks for n in range(len(mark) or 1) if text.endswith(mark[:n]))
    return text[: len(text) - held]
