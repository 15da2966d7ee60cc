"""A conversation about media in, prompt text and token ids out; generated ids in, the answer's text out.

A prompt is a tuple of texts and marks, not one string: what a user types is always text, even where it reads
`<ImageHere>` or `</s>`. Strings and ids equal the reference's (its `conversation_video.py`) for the vicuna and llama_2
templates; where the reference has no wording, the docstring says so.
"""

import dataclasses
import enum
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32

from vllama_jax.errors import ConfigError
from vllama_jax.text.tokenizer import Tokenizer

DEFAULT_SYSTEM = (
    "You are able to understand the visual content that the user provides. "
    "Follow the instructions carefully and explain your answers in detail."
)


class Mark(enum.Enum):
    """What stands in a prompt beside text. The value is how `render` shows it."""

    MEDIA = "<ImageHere>"
    BOS = "<s>"
    EOS = "</s>"


Prompt = tuple[str | Mark, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """How turns become a prompt: opening, then user message, cue, answer, next turn, user message, cue, …

    Attributes:
        system: what stands before and after the system text, together the opening; None: no opening, no system text.
        next_message: between the messages of two media of one turn.
        media_words: whether media come in tags and sentences, with a space before the question, or bare.
        cue: what the answer follows.
        answer_gap: between the cue and an answer of the past.
        next_turn: between an answer and the user's next message.
        stop: what ends an answer.
        role: the name after whose last mention an answer begins; "" for none.
    """

    name: str
    system: tuple[str, str] | None
    next_message: str
    media_words: bool
    cue: str
    answer_gap: str
    next_turn: Prompt
    stop: str | Mark
    role: str


TEMPLATES = {
    template.name: template
    for template in (
        Template(
            name="vicuna",
            system=("", "###Human: "),
            next_message="###Human: ",
            media_words=True,
            cue="###Assistant:",
            answer_gap=" ",
            next_turn=("###Human: ",),
            stop="###",
            role="Assistant:",
        ),
        Template(
            name="llama_2",
            system=("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
            next_message=" ",
            media_words=True,
            cue=" [/INST]",
            answer_gap=" ",
            next_turn=(" ", Mark.EOS, Mark.BOS, "[INST] "),
            stop=Mark.EOS,
            role="ASSISTANT:",
        ),
        Template(  # stage 1 saw captions after bare media tokens, ended by a newline
            name="plain",
            system=None,
            next_message="",
            media_words=False,
            cue="",
            answer_gap=" ",
            next_turn=("\n",),
            stop="\n",
            role="",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Media:
    """One file of a conversation. `sound`: whether a video's sound is heard too. `seconds`: when its frames were."""

    kind: Literal["video", "image", "audio"]
    sound: bool = False
    seconds: tuple[float, ...] = ()

    @property
    def slots(self) -> tuple[str, ...]:
        """What goes into its places in the prompt, in order: sound comes before sight."""
        return ("audio", self.kind) if self.sound and self.kind == "video" else (self.kind,)


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

    template: Template
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


def find_template(name: str) -> Template:
    """The template of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"unknown prompt template {name!r}: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def system_text(audio_branch: bool, media: Media | None) -> str:
    """The system text of the reference's demos, which the file shown last decides.

    A picture-only model gets the long sentence always, one with the audio branch only for images. Sound in use empties
    it. Without media (which no demo allows) it is empty.
    """
    if media is None or "audio" in media.slots:
        return ""
    return DEFAULT_SYSTEM if media.kind == "image" or not audio_branch else ""


def time_message(seconds: Sequence[float]) -> str:
    """When the frames of a video were, with the space that follows."""
    times = ", ".join(str(round(float(second), 1)) for second in seconds)
    return f"The video contains {len(seconds)} frames sampled at {times} seconds. "


def media_message(media: Media) -> Prompt:
    """The words around a file. The runs of spaces are the reference's own.

    The reference never has sound alone; its wording here is the sound half of the sentence for both.
    """
    hear = "Close your eyes, open your ears and you imagine only based on the sound that: "
    if media.slots == ("audio", "video"):
        see = "." + " " * 17 + "Close your ears, open your eyes and you see that <Video>"
        end = "</Video>." + " " * 18 + "Now answer my question based on what you have just seen and heard."
        return (hear, Mark.MEDIA, see, Mark.MEDIA, end)
    if media.kind == "audio":
        return (hear, Mark.MEDIA, "." + " " * 18 + "Now answer my question based on what you have just heard.")
    if media.kind == "video":
        return ("<Video>", Mark.MEDIA, "</Video> " + time_message(media.seconds))
    return ("<Image>", Mark.MEDIA, "</Image> ")


def build_prompt(conversation: Conversation) -> Prompt:
    """All turns; after the last question, the cue that the answer follows."""
    template, turns = conversation.template, conversation.turns
    prompt: list[str | Mark] = []
    if template.system is not None:
        shown = [media for turn in turns for media in turn.media]
        automatic = system_text(conversation.audio_branch, shown[-1] if shown else None)
        system = automatic if conversation.system is None else conversation.system
        prompt += [template.system[0], system, template.system[1]]
    for i, turn in enumerate(turns):
        prompt += [*(template.next_turn if i else ()), *_user_message(template, turn), template.cue]
        if turn.answer is not None:  # what follows media directly was trained without a gap
            prompt += [template.answer_gap if template.cue or turn.question else "", turn.answer]
            prompt += [Mark.EOS] if turn.ended else []
    return _join_texts(prompt)


def render(conversation: Conversation) -> str:
    """The prompt as one string, for people and tests: `<ImageHere>` in it may be a place for media or a user's text."""
    return "".join(part.value if isinstance(part, Mark) else part for part in build_prompt(conversation))


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, media_lengths: Sequence[int]
) -> TokenizedPrompt:
    """Token ids of `build_prompt`; see `encode_prompt`. Media come in the order of turns, files and `Media.slots`."""
    return encode_prompt(tokenizer, build_prompt(conversation), media_lengths)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, media_lengths: Sequence[int]) -> TokenizedPrompt:
    """Token ids of a prompt: the start token, then each text encoded by itself, as in the reference.

    Args:
        media_lengths: how many tokens go into each place for media, in order of appearance.

    Raises:
        ValueError: more or fewer lengths than places.
    """
    places = prompt.count(Mark.MEDIA)
    if places != len(media_lengths):
        raise ValueError(f"the prompt has {places} places for media, but {len(media_lengths)} lengths were given")
    lengths = iter(media_lengths)
    ids, is_media = [tokenizer.bos_id], [False]
    special = {Mark.BOS: tokenizer.bos_id, Mark.EOS: tokenizer.eos_id}
    for part in _join_texts(prompt):
        if part is Mark.MEDIA:
            new = [0] * next(lengths)
        else:
            new = [special[part]] if isinstance(part, Mark) else tokenizer.encode(part, special=False)
        ids += new
        is_media += [part is Mark.MEDIA] * len(new)
    return TokenizedPrompt(np.array(ids, np.int32), np.array(is_media, bool))


def stop_sequences(tokenizer: Tokenizer, template: Template) -> list[tuple[int, ...]]:
    """The ids that end an answer when they are the last ones generated.

    A stop string has other ids by itself than after other text (LLaMA's "###" is 835, or 2277 and 29937), and in some
    vocabularies it may melt into what precedes it: `stream_answer` looks at the text too.
    """
    if isinstance(template.stop, Mark):
        return [(tokenizer.eos_id,)]
    found = {tuple(tokenizer.encode(template.stop, special=False))}
    for context in ("\n", ".", "a"):
        before = tokenizer.encode(context, special=False)
        both = tokenizer.encode(context + template.stop, special=False)
        if both[: len(before)] == before:
            found.add(tuple(both[len(before) :]))
    return sorted(ids for ids in found if not any(ids != other and ids[-len(other) :] == other for other in found))


def decode_answer(tokenizer: Tokenizer, template: Template, ids: Iterable[int]) -> str:
    """The answer in generated ids, the dummy start token allowed; what follows an end token is left out."""
    return clean_answer(template, tokenizer.decode(_before_end(tokenizer, ids), skip_special=True))


def past_answer(tokenizer: Tokenizer, template: Template, ids: Sequence[int]) -> tuple[str, bool]:
    """An answer as the prompts of later turns have it: its text, and whether the model's EOS follows.

    The original cuts an answer at the template's stop and strips it, and so keeps an EOS that ended it (of Vicuna), and
    the space before one. There is none where a stop string or the limit of new tokens ended the answer, nor where the
    template itself puts one between turns (LLaMA-2).
    """
    until_end = _before_end(tokenizer, ids)
    text = tokenizer.decode(until_end, skip_special=True)
    ended = len(until_end) < len(ids) and template.stop is not Mark.EOS and _stop_text(template) not in text
    text = _cut_answer(template, text)
    return (text.lstrip() if ended else text.strip()), ended


def clean_answer(template: Template, text: str) -> str:
    """Cuts a text at the stop string and at the last mention of the assistant's role, and strips it."""
    return _cut_answer(template, text).strip()


def stream_answer(tokenizer: Tokenizer, template: Template, batches: Iterable[Sequence[int]]) -> Iterator[str]:
    """The answer in pieces while its ids are generated. Stops taking batches when the answer has ended.

    A piece is held back while it may be the beginning of a stop string, a role or a character. The pieces joined are
    `decode_answer` of the ids, but where the role is named again once text was shown: that stays.
    """
    ids: list[int] = []
    shown = start = 0
    for batch in itertools.chain(batches, [None]):
        ids.extend([] if batch is None else batch)
        until_end = _before_end(tokenizer, ids)
        ended = batch is None or len(until_end) < len(ids)
        text = tokenizer.decode(until_end, skip_special=True) if ended else tokenizer.settled_text(until_end)
        ended = ended or _stop_text(template) in text
        text = text.split(_stop_text(template))[0] if ended else _without_beginning_of_mark(template, text)
        if not shown:
            start = _start_of_answer(template, text)
        text = text[start:].strip()
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
        if ended:
            return


def _user_message(template: Template, turn: Turn) -> list[str | Mark]:
    """Media and question in one message; the reference gives each file but the last a message of its own."""
    parts: list[str | Mark] = []
    for i, media in enumerate(turn.media):
        words = media_message(media) if template.media_words else (Mark.MEDIA,) * len(media.slots)
        parts += [template.next_message if i else "", *words]
    gap = " " if turn.media and template.media_words else ""
    return parts if turn.question is None else [*parts, gap, turn.question]


def _join_texts(parts: Iterable[str | Mark]) -> Prompt:
    """Neighbouring texts as one, since a tokenizer sees across their seams; no empty texts."""
    joined: list[str | Mark] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part:
            joined.append(part)
    return tuple(joined)


def _stop_text(template: Template) -> str:
    return template.stop.value if isinstance(template.stop, Mark) else template.stop


def _cut_answer(template: Template, text: str) -> str:
    text = text.split(_stop_text(template))[0]
    return text[_start_of_answer(template, text) :]


def _start_of_answer(template: Template, text: str) -> int:
    found = text.rfind(template.role) if template.role else -1
    return 0 if found < 0 else found + len(template.role)


def _before_end(tokenizer: Tokenizer, ids: Iterable[int]) -> list[int]:
    return list(itertools.takewhile(lambda token_id: token_id != tokenizer.eos_id, map(int, ids)))


def _without_beginning_of_mark(template: Template, text: str) -> str:
    """The text less the longest end that a stop string or the role begins with."""
    marks = (_stop_text(template), template.role)
    held = max(n for mark in marks for n in range(len(mark) or 1) if text.endswith(mark[:n]))
    return text[: len(text) - held]
