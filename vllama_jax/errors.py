"""What a user's input can cause. Every message stands alone: it says what is wrong and what to do."""

from collections.abc import Iterable


class VllamaError(Exception):
    """Base of every error that bad input causes; the command line prints it as one line and exits with 1."""


class MediaError(VllamaError):
    """A video, sound or picture that cannot be used."""


class CheckpointError(VllamaError):
    """Weights, a model directory or a run directory that cannot be used."""


class ConfigError(VllamaError):
    """An option or a config field that does not fit the model or the machine."""


class StoreError(VllamaError):
    """A URL of an object store that cannot be used: of an unknown scheme, or of one whose package is missing."""


class ArrayError(VllamaError):
    """An array whose shape or dtype a method of the network does not take."""


class DataError(VllamaError):
    """Annotations or records that cannot be used."""


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return the question that names the known name closest to `name`, or "" where none is close."""
    import difflib

    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]!r}?" if near else ""


def format_os_error(error: OSError) -> str:
    """What is said of an error of the system where nothing better is known: the file and the reason."""
    why = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return " ".join(why.split())


def format_error(problem: Exception) -> str:
    """What an error of another library says, on one line of at most 200 characters; its type where it says nothing."""
    return " ".join(str(problem).split())[:200] or type(problem).__name__
