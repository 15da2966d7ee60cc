"""Prompt templates: one table of how chats, captions and conversations are formatted for a language model.

A prompt is a tuple of texts, marks and special tokens, not one string. A user's input is always text, even if it
contains `<ImageHere>`, `</s>` or `<|im_end|>`. Options of commands and messages derive from `TEMPLATES`.
"""

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, Literal

from vllama_jax.errors import ConfigError


class Mark(enum.Enum):
    """A media placeholder, or a special token that the tokenizer defines. `render` prints the value.

    BOS is omitted if the tokenizer's prompts start without one.
    """

    MEDIA = "<ImageHere>"
    BOS = "<s>"
    EOS = "</s>"


@dataclasses.dataclass(frozen=True)
class Token:
    """A special token of the tokenizer, identified by its text: `Token("<|im_start|>")`."""

    text: str


Segment = str | Mark | Token
Prompt = tuple[Segment, ...]

UNLABELED, LABELED = False, True
LabeledPrompt = tuple[tuple[Segment, bool], ...]  # segments of a training text, and whether they have labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How the turns of a chat become a prompt.

    The order is: opening, user message, generation prompt, answer, turn separator, user message, generation prompt, …

    Attributes:
        opening: Before the first user message, if there is no system prompt.
        system: Before and after a system prompt, in place of `opening`; None if system prompts are not supported.
        media_separator: Between the messages of two media files of a turn.
        media_tags: Whether media have tags and sentences around them, and a space before the question.
        generation_prompt: Before an answer.
        answer_prefix: Between the generation prompt and an answer, in later prompts.
        turn_separator: Between an answer and the next user message.
        stop: Ends an answer: a stop string, EOS or a special token.
        role: The assistant's name. An answer starts after the last mention of it; "" for none.
        more_stops: Other stop strings.
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
    more_stops: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionTemplate:
    """How a caption is formatted for training.

    Attributes:
        wrap: Before and after the instruction.
        end: After the caption, with labels.
    """

    wrap: tuple[Prompt, Prompt]
    end: Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationTemplate:
    """How the turns of a conversation become a training text. Segments of the template may have labels too.

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
    """The forms of a template; None for a form that it does not have.

    Attributes:
        chat: For chats.
        caption: For training on captions.
        conversation: For training on conversations.
    """

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
        conversation=ConversationTemplate(  # each "###" has labels, as the end of a turn; so does the role
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
    "plain": Template(  # of stage 1: media tokens, a caption, a newline
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
            opening=tuple((segment, UNLABELED) for segment in CHATML_USER),
            question_end=CHATML_ASSISTANT,
            answer_start=(),
            answer_end=(IM_END,),
            next_question=("\n", *CHATML_USER),
        ),
    ),
    "mistral": Template(  # Mistral-7B-Instruct v0.1 and v0.2: [INST] is text; a system prompt is in the first turn
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
    "llama_2_literal": Template(  # in the reference's YAML, each newline is a backslash and an n
        caption=CaptionTemplate(wrap=((r"[INST] <<SYS>>\n \n<</SYS>>\n\n",), (" [/INST] ",)), end=(Mark.EOS,)),
    ),
}

if TYPE_CHECKING:
    TemplateName = str
else:
    TemplateName = Literal[tuple(name for name, template in TEMPLATES.items() if template.chat)]


def find_template(name: str) -> ChatTemplate:
    """Return the chat form of a template.

    Args:
        name: A key of `TEMPLATES`.

    Raises:
        ConfigError: There is no such template, or it is only for training.
    """
    return _find(name, "chat", "unknown prompt template {}")


def find_caption_template(name: str) -> CaptionTemplate:
    """Return the caption form of a template.

    Args:
        name: A key of `TEMPLATES`.

    Raises:
        ConfigError: There is no such template, or it has no caption form.
    """
    return _find(name, "caption", "no template {} for captions")


def find_conversation_template(name: str) -> ConversationTemplate:
    """Return the conversation form of a template, which is for training.

    Args:
        name: A key of `TEMPLATES`.

    Raises:
        ConfigError: There is no such template, or it has no conversation form.
    """
    return _find(name, "conversation", "no template {} for training on conversations")


def special_tokens(form: Any) -> list[Token]:
    """Return the special tokens of a form of a template, without duplicates."""
    if isinstance(form, Token):
        return [form]
    if dataclasses.is_dataclass(form):
        form = tuple(getattr(form, field.name) for field in dataclasses.fields(form))
    nested = form if isinstance(form, tuple) else ()
    return list(dict.fromkeys(token for segment in nested for token in special_tokens(segment)))


def _find(name: str, form: str, problem: str) -> Any:
    template_form = getattr(TEMPLATES.get(name), form, None)
    if template_form is None:
        known = ", ".join(known for known, template in TEMPLATES.items() if getattr(template, form))
        raise ConfigError(f"{problem.format(repr(name))}: choose one of {known}")
    return template_form
