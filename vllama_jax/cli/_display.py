"""Terminal output of `vllama chat` and `vllama eval`: status and messages on stderr, answers on stdout."""

import sys
from collections.abc import Iterable
from typing import Self

from rich.console import Console
from rich.text import Text


class Display:
    """Shows a status line with a spinner (only on a terminal), messages, and streamed answers.

    Args:
        quiet: Print no answers, because stdout is for JSON.
    """

    def __init__(self, *, quiet: bool = False):
        self._quiet = quiet
        self._status = Console(stderr=True).status("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def show_status(self, text: str) -> None:
        """Show what the command does now, until the next status or message."""
        if sys.stderr.isatty():
            self._status.update(Text(text))  # not markup: a path may contain brackets
            self._status.start()

    def update_status(self, text: str) -> None:
        """Change the status, if one is shown. Other threads may call this."""
        self._status.update(Text(text))

    def show_message(self, text: str) -> None:
        """Print a line on stderr."""
        self._status.stop()
        print(text, file=sys.stderr, flush=True)

    def print_answer(self, texts: Iterable[str]) -> None:
        """Print the texts of an answer as they arrive."""
        for text in texts:
            self._status.stop()
            if not self._quiet:
                print(text, end="", flush=True)
        self._status.stop()
        if not self._quiet:
            print(flush=True)


def format_count(count: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun: "1 entry", "2,000 entries"."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"
