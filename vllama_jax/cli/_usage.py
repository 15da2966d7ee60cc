"""Command-line parsing: arguments, `--help` and usage errors.

tyro parses the arguments. This module reduces its errors to one line, and removes uninformative defaults from its help.
"""

import contextlib
import functools
import inspect
import io
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from vllama_jax.cli._suggestions import suggest_option
from vllama_jax.errors import StoreError, VllamaError
from vllama_jax.io.paths import as_path
from vllama_jax.io.store_path import StorePath

Command = Callable[..., None]

JsonFlag = Annotated[bool, tyro.conf.arg(name="json")]  # --json; a parameter `json` would shadow the module
TYRO_CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
UNWRAPPED_COLUMNS = "10000"  # a terminal width at which tyro wraps no line
TYPES = {"INT": "a whole number", "FLOAT": "a number", "FLOAT|STR": "a time"}
_FLAG = re.compile(r"│ +(--[\w.-]+)(?: (\S+))?")  # an option and its type in unwrapped help
_NO_DEFAULT = re.compile(r"\(default:[\s│]*(?:None|True|False|'')?[\s│]*\)")
_FIELD = re.compile(r"[a-z][\w.]*(?= )")


PATHS = tyro.constructors.ConstructorRegistry()


def _path_spec(make_path: Callable[[str], Path]) -> tyro.constructors.PrimitiveConstructorSpec[Path]:
    """Describe an argument that `make_path` makes a path of."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda arguments: make_path(arguments[0]),
        is_instance=lambda value: isinstance(value, Path | StorePath),
        str_from_instance=lambda value: [str(value)],
    )


@PATHS.primitive_rule
def _path_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
    """Make every `Path` argument with `as_path`, so that a URL never becomes a local directory."""
    return _path_spec(as_path) if info.type is Path else None


# A media file, a directory or a URL. It stays text, because a path would change URLs.
MediaArgument = Annotated[
    str,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda arguments: arguments[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]


class UsageError(VllamaError):
    """Invalid command-line arguments; the exit code is 2."""


def parse(command: Command, prog: str, arguments: Sequence[str]) -> Callable[[], None]:
    """Parse the arguments of a command and return a function that runs it.

    Args:
        command: A function whose parameters are the arguments and options of the command.
        prog: The words that start the command, such as "vllama chat".
        arguments: The words that follow.

    Returns:
        A function without parameters.

    Raises:
        UsageError: The arguments are invalid.
        SystemExit: `--help` was given; the help is printed.
    """
    asked_for_help = any(argument in ("-h", "--help") for argument in arguments)
    arguments = ["--help"] if asked_for_help else arguments  # help takes precedence over other errors
    try:
        with _capture_output(wide=not asked_for_help) as printed:
            return tyro.cli(_defer(command), prog=prog, args=arguments, config=TYRO_CONFIG, registry=PATHS)
    except SystemExit as stop:
        if stop.code:
            raise UsageError(_explain_error(printed.getvalue(), command, prog, arguments)) from None
        print(format_help(printed.getvalue()) if asked_for_help else printed.getvalue(), end="")
        raise
    except StoreError:  # of a path; the exit code is 1
        raise
    except VllamaError as error:  # a dataclass of options rejects a value
        raise UsageError(_replace_field_with_flag(str(error), render_help(command, prog))) from error


def require_at_least(low: float, **options: float | None) -> None:
    """Check that options are at least `low`.

    Args:
        low: The minimum.
        **options: Values by option name; None for an option that was not given.

    Raises:
        UsageError: An option is below the minimum.
    """
    for name, value in options.items():
        if value is not None and not value >= low:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {low}, not {value}")


def format_command_list(prog: str, commands: Mapping[str, str], example: str) -> str:
    """Return the help of a program that has commands.

    Args:
        prog: The words that start the program.
        commands: A description of each command, by name.
        example: A complete command line.
    """
    lines = [f"  {name:10}{description}" for name, description in commands.items()]
    end = [f"Run `{prog} COMMAND --help` for the options of a command.", "", f"Example: {example}"]
    return "\n".join([f"usage: {prog} COMMAND …", "", *lines, "", *end])


def render_help(command: Command, prog: str) -> str:
    """Return the help of a command as tyro draws it, unwrapped."""
    with contextlib.suppress(SystemExit), _capture_output(wide=True) as printed:
        tyro.cli(_defer(command), prog=prog, args=["--help"], config=TYRO_CONFIG, registry=PATHS)
    return printed.getvalue()


def format_help(text: str) -> str:
    """Wrap the text around tyro's boxes, and remove defaults of flags and defaults that are None or empty."""
    text = _NO_DEFAULT.sub(lambda found: re.sub(r"[^│\n]", " ", found[0]), text)
    width = os.get_terminal_size().columns if sys.stdout.isatty() else int(os.environ.get("COLUMNS") or 80)
    lines = []
    for line in text.splitlines():
        if line.startswith(("╭", "╰", "│")):
            lines += [] if re.fullmatch("│ *│", line) else [line]
        else:
            lines += _wrap(line, width)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _wrap(line: str, width: int) -> list[str]:
    """Wrap a line of help. An option and its value stay on one line; examples get backslashes, to be copied."""
    example, text = line.startswith("Example: "), re.sub(r"(--[\w.-]+) (?=[^\s\[-])", "\\1\0", line)
    indent = "    " if example or line.startswith("usage: ") else "  " if line.startswith("- ") else ""
    wrapped = textwrap.wrap(text, width - 2 * example, subsequent_indent=indent, break_on_hyphens=False) or [""]
    lines = [row.replace("\0", " ") for row in wrapped]
    return [f"{row} \\" for row in lines[:-1]] + lines[-1:] if example else lines


class _Utf8Buffer(io.StringIO):
    """A text buffer with an encoding: tyro draws its boxes in ASCII unless the encoding is UTF-8."""

    encoding = "utf-8"


@contextlib.contextmanager
def _capture_output(*, wide: bool) -> Iterator[io.StringIO]:
    """Capture stdout and stderr, wrapped at the terminal's width, or unwrapped if `wide`."""
    printed, columns = _Utf8Buffer(), os.environ.get("COLUMNS")
    if wide:
        os.environ["COLUMNS"] = UNWRAPPED_COLUMNS
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield printed
    finally:
        if wide:
            os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _defer(command: Command) -> Callable[..., Callable[[], None]]:
    """Return a function with the command's signature that only binds the arguments, because tyro calls it."""

    @functools.wraps(command)
    def bind(*arguments: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **options)

    bind.__signature__ = inspect.signature(command)  # type: ignore[attr-defined]  # `inspect` reads it
    bind.__doc__ = _join_paragraph_lines(command.__doc__ or "")
    del bind.__wrapped__  # tyro would read the docstring of the wrapped function
    return bind


def _join_paragraph_lines(docstring: str) -> str:
    """Join the lines of each paragraph, list item and argument of a docstring: tyro keeps some line breaks."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    joined = [re.sub(r"\n {8,}" if text.startswith("Args:") else r"\n(?!- )", " ", text) for text in paragraphs]
    return "\n\n".join(joined)


def _explain_error(box: str, command: Command, prog: str, arguments: Sequence[str]) -> str:
    """Reduce tyro's error box to one line."""
    lines = [line.strip("│").rstrip() for line in box.splitlines()[1:-1]]
    help_text = render_help(command, prog)
    flags = {name: type_name for name, type_name in _FLAG.findall(help_text) if name != "--help"}
    message = " ".join(" ".join(lines[: next((i for i, line in enumerate(lines) if "──" in line), None)]).split())
    if unknown := _find_unknown_option(arguments, flags):
        return f"{unknown} is not an option of `{prog}`{suggest_option(unknown, list(flags), command.__name__)}"
    if found := re.search(r"Error parsing (--[\w.-]+)|(?:invalid choice|value) .*?for argument '([\w.-]+)'", message):
        return _explain_bad_value(found[1] or found[2], flags, arguments, message)
    if message.startswith("Unrecognized options: "):
        extra = message.removeprefix("Unrecognized options: ")
        return f"unexpected argument {extra}; `{prog} --help` lists the arguments"
    missing = [line.strip() for line in lines if re.match(r" {5}\S", line) and not line.strip().startswith(prog)]
    verb = "are" if len(missing) > 1 else "is"
    return f"{', '.join(missing)} {verb} missing. {_find_first_example(command)}" if missing else message


def _find_unknown_option(arguments: Sequence[str], flags: Mapping[str, str]) -> str | None:
    """Return the first argument that looks like an option but is not one of `flags`."""
    for argument in arguments:
        if argument == "--":
            return None
        name = argument.split("=", 1)[0]
        if re.match(r"--?[a-zA-Z]", name) and name.replace("_", "-") not in flags:
            return name
    return None


def _explain_bad_value(name: str, flags: Mapping[str, str], arguments: Sequence[str], message: str) -> str:
    """Return what is wrong with the value of an argument."""
    type_name = flags.get(name, "")
    values = [a.partition("=")[2] for a in arguments if a.replace("_", "-").startswith(f"{name}=")]
    values += [value for flag, value in itertools.pairwise(arguments) if flag.replace("_", "-") == name]
    if message.startswith("Missing value"):
        return f"{name} needs a value: {TYPES.get(type_name) or type_name.strip('{}').replace(',', ', ')}"
    if found := re.match(r"invalid choice '(.*?)' .* Expected one of \((.*)\)", message):
        choices = type_name.strip("{}[]").split(",") if "{" in type_name else sorted(re.findall(r"'([^']+)'", found[2]))
        name = name if name in flags else name.upper()  # a positional argument, in capitals as in the help
        return f"{name}: {found[1]!r} is not one of {', '.join(choices)}"
    if values and type_name in TYPES:
        return f"{name}: {values[-1]!r} is not {TYPES[type_name]}"
    return message.removeprefix("Error parsing ")


def _replace_field_with_flag(message: str, help_text: str) -> str:
    """Replace the name of a field at the beginning of a message with its option, if the command has one."""
    found = _FIELD.match(message)
    if found is None:
        return message
    flag = f"--{found[0].replace('_', '-')}"
    return flag + message[len(found[0]) :] if flag in dict(_FLAG.findall(help_text)) else message


def _find_first_example(command: Command) -> str:
    """Return the first example of a command's docstring, on one line."""
    lines = _join_paragraph_lines(command.__doc__ or "").splitlines()
    return next((line for line in lines if line.startswith("Example: ")), "")
