"""Prompt templates as data: one table of how chats, captions and conversations are written for a language model.

A prompt is a tuple of texts, marks and special tokens, not one string: what a user types is always text, even where it
reads `<ImageHere>`, `</s>` or `<|im_end|>`. The command line's choices and all messages derive from `TEMPLATES`.
"""

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, Literal

from vllama_jax.errors import ConfigError


class Mark(enum.Enum):
    """A place for media, or a role of the tokenizer. The value is how `render` shows it.

    BOS is nothing where the tokenizer's prompts start without one.
    """

    MEDIA = "<ImageHere>"
    BOS = "<s>"
    EOS = "</s>"


@dataclasses.dataclass(frozen=True)
class Token:
    """A special token of the tokenizer, by its text: `Token("<|im_start|>")`."""

    text: str


Segment = str | Mark | Token
Prompt = tuple[Segment, ...]

UNLABELED, LABELED = False, True
LabeledPrompt = tuple[tuple[Segment, bool], ...]  # parts of a training text, and whether they have labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How turns become a prompt: opening, then user message, cue, answer, next turn, user message, cue, …

    Attributes:
        opening: Before the first user message where there is no system text.
        system: Before and after a system text, in place of `opening`; None: there is no place for one.
        next_message: Between the messages of two media of one turn.
        media_words: Whether media come in tags and sentences, with a space before the question, or bare.
        cue: What the answer follows.
        answer_gap: Between the cue and an answer of the past.
        next_turn: Between an answer and the user's next message.
        stop: What ends an answer: a text, EOS or a special token.
        role: The name after whose last mention an answer begins; "" for none.
    """

    opening: Prompt
    system: tuple[Prompt, Prompt] | None
    media_separator: str
    media_tags: bool
    generation_prompt: Prompt
    answer_prefix: str
    turn_separator: Prompt
    stop: Segment
    role: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionTemplate:
    """How a caption follows media in training.

    Attributes:
        wrap: Before and after an instruction.
        end: After the caption, with labels.
    """

    wrap: tuple[Prompt, Prompt]
    end: Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationTemplate:
    """How turns become a training text. Parts of the template itself may have labels too.

    Attributes:
        opening: Before the first question.
        question_end: After a question, without labels.
        answer_start: Before an answer, with labels.
        answer_end: After an answer, with labels.
        next_question: Before each question but the first, without labels.
    """

    opening: LabeledPrompt
    question_end: Prompt
    answer_start: Prompt
    answer_end: Prompt
    next_question: Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """The forms that a template has, None for those that it has not."""

    chat: ChatTemplate | None = None
    caption: CaptionTemplate | None = None
    conversation: ConversationTemplate | None = None


IM_START, IM_END = Token("<|im_start|>"), Token("<|im_end|>")
CHATML_USER: Prompt = (IM_START, "user\n")
CHATML_ASSISTANT: Prompt = (IM_END, "\n", IM_START, "assistant\n")

TEMPLATES: dict[str, Template] = {
    "vicuna": Template(
        chat=ChatTemplate(
            opening=("###Human: ",),
            system=((), ("###Human: ",)),
            media_separator="###Human: ",
            media_tags=True,
            generation_prompt=("###Assistant:",),
            answer_prefix=" ",
            turn_separator=("###Human: ",),
            stop="###",
            role="Assistant:",
        ),
        caption=CaptionTemplate(wrap=(("###Human: ",), (" ###Assistant: ",)), end=("###",)),
        conversation=ConversationTemplate(  # each "###" has labels, as the end of what came before; so has the role
            opening=(("\n\n", UNLABELED), ("###", LABELED), ("Human: ", UNLABELED)),
            question_end=("\n",),
            answer_start=("###Assistant: ",),
            answer_end=("\n###",),
            next_question=("Human: ",),
        ),
    ),
    "llama_2": Template(
        chat=ChatTemplate(
            opening=("[INST] <<SYS>>\n\n<</SYS>>\n\n",),
            system=(("[INST] <<SYS>>\n",), ("\n<</SYS>>\n\n",)),
            media_separator=" ",
            media_tags=True,
            generation_prompt=(" [/INST]",),
            answer_prefix=" ",
            turn_separator=(" ", Mark.EOS, Mark.BOS, "[INST] "),
            stop=Mark.EOS,
            role="ASSISTANT:",
        ),
        caption=CaptionTemplate(wrap=(("[INST] <<SYS>>\n \n<</SYS>>\n\n",), (" [/INST] ",)), end=(Mark.EOS,)),
        conversation=ConversationTemplate(
            opening=(("[INST] <<SYS>>\n \n<</SYS>>\n\n", UNLABELED),),
            question_end=(" [/INST]",),
            answer_start=(" ",),
            answer_end=(" ", Mark.EOS),
            next_question=(Mark.BOS, "[INST] "),
        ),
    ),
    "plain": Template(  # stage 1 saw captions after bare media tokens, ended by a newline
        chat=ChatTemplate(
            opening=(),
            system=None,
            media_separator="",
            media_tags=False,
            generation_prompt=(),
            answer_prefix=" ",
            turn_separator=("\n",),
            stop="\n",
            role="",
        ),
        caption=CaptionTemplate(wrap=((), ()), end=("\n",)),
    ),
    "chatml": Template(  # Qwen's
        chat=ChatTemplate(
            opening=CHATML_USER,
            system=((IM_START, "system\n"), (IM_END, "\n", *CHATML_USER)),
            media_separator=" ",
            media_tags=True,
            generation_prompt=CHATML_ASSISTANT,
            answer_prefix="",
            turn_separator=(IM_END, "\n", *CHATML_USER),
            stop=IM_END,
            role="",
        ),
        caption=CaptionTemplate(wrap=(CHATML_USER, CHATML_ASSISTANT), end=(IM_END,)),
        conversation=ConversationTemplate(
            opening=tuple((part, UNLABELED) for part in CHATML_USER),
            question_end=CHATML_ASSISTANT,
            answer_start=(),
            answer_end=(IM_END,),
            next_question=("\n", *CHATML_USER),
        ),
    ),
    "mistral": Template(  # Mistral-7B-Instruct v0.1 and v0.2, where [INST] is text; a system text is in the first turn
        chat=ChatTemplate(
            opening=("[INST] ",),
            system=(("[INST] ",), ("\n\n",)),
            media_separator=" ",
            media_tags=True,
            generation_prompt=(" [/INST]",),
            answer_prefix=" ",
            turn_separator=(Mark.EOS, "[INST] "),
            stop=Mark.EOS,
            role="",
        ),
        caption=CaptionTemplate(wrap=(("[INST] ",), (" [/INST] ",)), end=(Mark.EOS,)),
        conversation=ConversationTemplate(
            opening=(("[INST] ", UNLABELED),),
            question_end=(" [/INST]",),
            answer_start=(" ",),
            answer_end=(Mark.EOS,),
            next_question=("[INST] ",),
        ),
    ),
    "llama_2_literal": Template(  # the reference's yaml quotes it so that each newline is a backslash and an n
        caption=CaptionTemplate(wrap=((r"[INST] <<SYS>>\n \n<</SYS>>\n\n",), (" [/INST] ",)), end=(Mark.EOS,)),
    ),
}

if TYPE_CHECKING:
    TemplateName = str
else:
    TemplateName = Literal[tuple(name for name, template in TEMPLATES.items() if template.chat)]


def find_template(name: str) -> ChatTemplate:
    """Return the chat form of a template.

    Raises:
        ConfigError: There is no such template, or it is only for training.
    """
    return _find(name, "chat", "unknown prompt template {}")


def find_caption_template(name: str) -> CaptionTemplate:
    """Return the caption form of a template. Raises ConfigError where there is none."""
    return _find(name, "caption", "no template {} for captions")


def find_conversation_template(name: str) -> ConversationTemplate:
    """Return the training conversations' form of a template. Raises ConfigError where there is none."""
    return _find(name, "conversation", "no template {} for conversations to learn from")


def special_tokens(form: Any) -> list[Token]:
    """Return the special tokens in a form of a template, each once."""
    if isinstance(form, Token):
        return [form]
    if dataclasses.is_dataclass(form):
        form = tuple(getattr(form, field.name) for field in dataclasses.fields(form))
    nested = form if isinstance(form, tuple) else ()
    return list(dict.fromkeys(token for part in nested for token in special_tokens(part)))


def _find(name: str, form: str, problem: str) -> Any:
    found = getattr(TEMPLATES.get(name), form, None)
    if found is None:
        known = ", ".join(known for known, template in TEMPLATES.items() if getattr(template, form))
        raise ConfigError(f"{problem.format(repr(name))}: choose one of {known}")
    return found
