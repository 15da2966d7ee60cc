"""What the user sees while a command works: what it is doing now on stderr, answers on stdout."""

import sys
from collections.abc import Iterable
from typing import Self

from rich.console import Console
from rich.text import Text


class Display:
    """A line that says what goes on (on a terminal only), sentences that stay, and streamed answers.

    quiet: nothing on stdout, which belongs to JSON then.
    """

    def __init__(self, *, quiet: bool = False):
        self._quiet = quiet
        self._status = Console(stderr=True).status("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def show_status(self, text: str) -> None:
        """What is being done until the next step."""
        if sys.stderr.isatty():
            self._status.update(Text(text))  # not markup: a path may hold brackets
            self._status.start()

    def show_message(self, text: str) -> None:
        """A sentence for people."""
        self._status.stop()
        print(text, file=sys.stderr, flush=True)

    def ask(self) -> str | None:
        """The user's next question; None at the end of input or for an empty line."""
        self._status.stop()
        try:
            return input("> " if sys.stdin.isatty() else "").strip() or None
        except EOFError:
            if sys.stdin.isatty():
                print()  # Ctrl-D leaves the cursor behind the prompt
            return None

    def answer(self, texts: Iterable[str]) -> None:
        """An answer, piece by piece as it comes."""
        for text in texts:
            self._status.stop()
            if not self._quiet:
                print(text, end="", flush=True)
        self._status.stop()
        if not self._quiet:
            print(flush=True)
