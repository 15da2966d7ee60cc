"""Questions and commands of `vllama chat`, from a terminal or line by line from stdin."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rich.filesize import decimal

from vllama_jax.chat import Chat
from vllama_jax.cli._display import Display
from vllama_jax.cli._usage import UsageError
from vllama_jax.config import GenerationConfig, from_dict
from vllama_jax.errors import ConfigError, ContextLengthError, DataError, VllamaError, suggest_name
from vllama_jax.io.atomic import check_absent, replace_file
from vllama_jax.io.json_files import parse_json
from vllama_jax.io.paths import as_path
from vllama_jax.media import MediaReport, OpenedSource
from vllama_jax.model import Model
from vllama_jax.runtime.interrupts import catch_interrupts

INT32 = range(-(2**31), 2**31)  # the integers that decoding can use
STOPPING = "stopping after this step; Ctrl-C again ends the program"
CONTEXT_ADVICE = "in this chat: /undo (the last turn), /reset (all turns and files), /set max_new_tokens N"


@dataclasses.dataclass(kw_only=True)
class Session:
    """The state of a chat on the command line.

    Attributes:
        chat: The conversation.
        display: The output.
        model_name: The model, as the user named it.
        template: The name of the prompt template.
        open_media: Opens a media file, given its path or URL.
        add_media: `Chat.add` with the options of the command line.
        generation: The options of decoding, which `/set` changes.
        transcript: The files and turns of the conversation, as `/save` writes them.
        turns: Question, answer, tokens and timings of each answer, also of those that were removed later.
        interrupted: Whether the user has pressed Ctrl-C since the last line was read.
    """

    chat: Chat
    display: Display
    model_name: str
    template: str
    open_media: Callable[[str], contextlib.AbstractContextManager[OpenedSource]]
    add_media: Callable[..., MediaReport]
    generation: GenerationConfig
    transcript: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    turns: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    interrupted: threading.Event = dataclasses.field(default_factory=threading.Event)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the chat.

    Attributes:
        argument: The name of its argument; "" without one, in brackets if it is optional.
        description: What it does, for `/help`.
        run: A function of the session and the argument, which returns a message for the user. None ends the chat.
    """

    argument: str
    description: str
    run: Callable[[Session, str], str] | None


def run_chat(session: Session, hint: str) -> None:
    """Answer questions and run commands until `/exit`, Ctrl-D or the end of stdin. Errors are shown and do not end it.

    On a terminal, the model is described first, and Ctrl-C stops an answer.

    Args:
        session: The session.
        hint: A line to show before the first question.
    """
    display = session.display
    with contextlib.ExitStack() as stack:
        lines = _read_stdin()
        if sys.stdin is not None and sys.stdin.isatty():
            from vllama_jax.cli._prompt import read_lines

            session.interrupted = stack.enter_context(catch_interrupts(lambda: display.update_status(STOPPING)))
            file_commands = [name for name, command in COMMANDS.items() if command.argument == "FILE"]
            lines = read_lines(list(COMMANDS), file_commands, display.show_message)
            display.show_message(describe_model(session.model_name, session.template, session.chat.model))
        display.show_message(hint)
        for line in lines:
            session.interrupted.clear()
            try:
                if not run_line(session, line):
                    return
            except VllamaError as error:
                advice = f"; {CONTEXT_ADVICE}" if isinstance(error, ContextLengthError) else ""
                display.show_message(f"vllama: {error}{advice}")


def run_line(session: Session, line: str) -> bool:
    """Answer the question or run the command in a line.

    Args:
        session: The session.
        line: The line. A command begins with a slash; a question may, after a space or another slash. White space
            around a line, and an empty line, are ignored.

    Returns:
        Whether the chat continues.

    Raises:
        UsageError: There is no such command, or its argument is missing or not accepted.
        VllamaError: The command failed, or the question cannot be answered. The conversation is unchanged.
    """
    text = line.strip()
    if not line.startswith("/") or line.startswith("//"):
        if text:
            answer_question(session, text[1:] if line.startswith("//") else text)
        return True
    name, argument = (*text.split(maxsplit=1), "")[:2]
    command = COMMANDS.get(name)
    if command is None or "\n" in argument:
        why = "a command has one line" if command else f"not a command; {suggest_name(name, COMMANDS)}".rstrip("; ")
        raise UsageError(f"{name[:40]}: {why}; /help lists the commands, // begins a question with a slash")
    if bool(argument) != bool(command.argument) and not command.argument.startswith("["):
        raise UsageError(f"{name} takes {command.argument or 'no argument'}; /help lists the commands")
    if command.run is not None:
        session.display.show_message(command.run(session, argument))
    return command.run is not None


def add_media(session: Session, opened: OpenedSource) -> MediaReport:
    """Read and encode a media file, and add it to the conversation.

    Args:
        session: The session.
        opened: The file.

    Raises:
        MediaError: The file cannot be used.
        ConfigError: It has more frames than the model has positions, or more segments than fit the context.
    """
    session.display.show_status(f"reading and encoding {opened.name} (the first run compiles)")
    report = session.add_media(opened, max_new_tokens=session.generation.max_new_tokens)
    record_file(session, report)
    return report


def record_file(session: Session, report: MediaReport) -> None:
    """Record that a file was added to the conversation, for `/save`."""
    session.transcript.append({"file": dataclasses.asdict(report)})


def answer_question(session: Session, question: str) -> None:
    """Stream the answer to a question to stdout. If it is interrupted, the conversation stays unchanged.

    Args:
        session: The session.
        question: The question.

    Raises:
        VllamaError: The question cannot be answered.
    """
    before = session.chat.last
    session.display.show_status("generating")
    stream = session.chat.ask(question, **dataclasses.asdict(session.generation))
    session.display.print_answer(_read_until_set(stream, session.interrupted))
    last = session.chat.last
    if last is None or last is before:
        session.display.show_message("stopped; the conversation is as before this question")
        return
    session.turns.append({"question": question, **dataclasses.asdict(last)})
    session.transcript.append({"question": question, "answer": last.answer})


def describe_model(name: str, template: str, model: Model) -> str:
    """Describe a loaded model on one line: its size, dtype, devices, prompt template and context length.

    Args:
        name: The model, as the user named it.
        template: The name of the prompt template.
        model: The model.
    """
    import jax

    weights = jax.tree.leaves(model.network)
    dtypes = {str(weight.dtype) for weight in weights}
    quantized = "int4" if "uint8" in dtypes else "int8" if "int8" in dtypes else None
    parameters = sum(weight.size * (2 if weight.dtype == "uint8" else 1) for weight in weights)  # two int4 share a byte
    devices = sorted(weights[0].devices(), key=lambda device: device.id)
    dtype = str(model.network.llama.embedding[...].dtype) + (f" with {quantized} weights" if quantized else "")
    size = decimal(sum(weight.nbytes for weight in weights))
    device = (f"{len(devices)} × " if len(devices) > 1 else "") + devices[0].device_kind
    return (
        f"{name}: {parameters / 1e6:,.1f} million parameters, {size}, {dtype}, on {device}; "
        f"prompt template {template}, context of {model.config.llama.max_length:,} tokens"
    )


def _read_stdin() -> Iterator[str]:
    """Iterate over the lines of stdin."""
    try:
        yield from sys.stdin or ()
    except UnicodeDecodeError as error:
        raise DataError(f"stdin: not {error.encoding} text ({error.reason})") from error


def _read_until_set(texts: Iterator[str], interrupted: threading.Event) -> Iterator[str]:
    """Iterate over texts until an event is set."""
    for text in texts:
        if interrupted.is_set():
            return
        yield text


def _show_help(session: Session, argument: str) -> str:
    names = {f"{name} {command.argument}": command.description for name, command in COMMANDS.items()}
    return "\n".join(f"{usage:22}{description}" for usage, description in names.items())


def _add_file(session: Session, argument: str) -> str:
    path = _parse_path(argument)
    session.display.show_status(f"opening {path}")
    with session.open_media(path) as opened:
        if session.interrupted.is_set():
            return "stopped; the file is not added"
        return f"{opened.name}: {add_media(session, opened)}"


def _parse_path(text: str) -> str:
    """Return the path that a user typed, or dropped on the terminal, which quotes or escapes white space."""
    if not os.path.exists(text):
        with contextlib.suppress(ValueError):  # a quote without its pair is a part of the name
            words = shlex.split(text)
            text = words[0] if len(words) == 1 else text
    return os.path.expanduser(text)


def _list_files(session: Session, argument: str) -> str:
    lines = [f"{report.path}: {report}" for report in session.chat.files]
    return "\n".join(lines) or "the conversation has no files; /add FILE adds one"


def _undo(session: Session, argument: str) -> str:
    question = session.chat.undo()
    last = max(number for number, entry in enumerate(session.transcript) if "question" in entry)
    del session.transcript[last]
    return f"removed, with its answer: {textwrap.shorten(question, 80, placeholder=' …')}"


def _reset(session: Session, argument: str) -> str:
    session.chat.reset()
    session.transcript.clear()
    return "all turns and files are removed; /add FILE adds a file"


def _save(session: Session, argument: str) -> str:
    path = as_path(_parse_path(argument))
    if path.suffix.lower() == ".json":
        fields = {"model": session.model_name, "template": session.template, "conversation": session.transcript}
        text = json.dumps(fields, indent=1, ensure_ascii=False) + "\n"
    else:
        text = "\n".join(map(_format_entry, session.transcript))
    check_absent(path)
    try:
        replace_file(path, text.encode())
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be written ({reason}); choose another path") from error
    return f"saved to {path}"


def _format_entry(entry: dict[str, Any]) -> str:
    """Format a file or a turn for a text file."""
    if "file" in entry:
        report = MediaReport(**entry["file"])
        return f"{report.path}: {report}\n"
    return f"{textwrap.indent(entry['question'], '> ')}\n{entry['answer']}\n"


def _set_option(session: Session, argument: str) -> str:
    fields = dataclasses.asdict(session.generation)
    if not argument:
        return "\n".join(f"{name} {json.dumps(value)}" for name, value in fields.items())
    name, text = re.fullmatch(r"([^\s=]*)[\s=]*(.*)", argument).groups()  # type: ignore[union-attr]  # matches any line
    name = name.lstrip("-").replace("-", "_")
    if name not in fields:
        raise UsageError(f"{name} is not an option; {suggest_name(name, fields) or '/set lists the options'}")
    if text:
        try:
            value = parse_json(text, name, ConfigError)
        except ConfigError:
            value = text  # a word without quotes
        if isinstance(fields[name], tuple) and isinstance(value, str):
            value = (value,)
        session.generation = from_dict({**fields, name: value}, GenerationConfig, "/set", INT32)
    return f"{name} {json.dumps(getattr(session.generation, name))}"


COMMANDS = {
    "/help": Command("", "list the commands", _show_help),
    "/add": Command("FILE", "add a video, an image, an audio file, a directory of images or a URL", _add_file),
    "/files": Command("", "list the files of the conversation", _list_files),
    "/undo": Command("", "remove the last question and its answer; files stay", _undo),
    "/reset": Command("", "remove all questions, answers and files", _reset),
    "/save": Command("FILE", "write the conversation to a new file: .json is JSON, any other text", _save),
    "/set": Command("[OPTION VALUE]", "change how answers are decoded; without OPTION, list the options", _set_option),
    "/exit": Command("", "end the chat, as Ctrl-D does", None),
}
