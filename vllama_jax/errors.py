"""The exceptions that invalid input causes, and how a command ends with one.

Each message says in one line what is wrong and what to do.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator


class VllamaError(Exception):
    """Base class of the errors that invalid input causes. The command line prints the message and exits with code 1.

    Attributes:
        in_all_processes: Whether all processes of a job raise this error (`vllama_jax.runtime.coordination`).
    """

    in_all_processes = False


class MediaError(VllamaError):
    """An image, video or audio file that cannot be used."""


class CheckpointError(VllamaError):
    """Weights, a model directory or a run directory that cannot be used or written."""


class ConfigError(VllamaError):
    """An option or a config field that is invalid, or does not fit the model or the machine."""


class ContextLengthError(ConfigError):
    """A prompt and an answer that together are longer than the model's context."""


class StoreError(VllamaError):
    """A URL of an object store that cannot be used: of an unknown scheme, or of one whose package is missing."""


class ArrayError(VllamaError):
    """An argument of the network with an unsupported shape or dtype."""


class DataError(VllamaError):
    """Annotation files or records that cannot be used."""


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return "did you mean …?" with the known name that is most similar to `name`, or "" if none is similar."""
    import difflib

    matches = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {matches[0]!r}?" if matches else ""


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """End a command whose body fails: with one line on stderr and exit code 1, or with code 130 after Ctrl-C."""
    try:
        yield
    except VllamaError as error:
        sys.exit(f"vllama: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout has closed the pipe: flushing it at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # an error that no command handles: a directory without permissions, a full disk
        sys.exit(f"vllama: {format_os_error(error)}")


def format_os_error(error: OSError) -> str:
    """Format an `OSError` that has no more specific message: the file and the reason, on one line."""
    message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return " ".join(message.split())


def format_error(error: Exception) -> str:
    """Format an exception of another library on one line of at most 200 characters; its type if it has no message."""
    return " ".join(str(error).split())[:200] or type(error).__name__
