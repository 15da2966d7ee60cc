"""The prompt of an interactive chat: line editing, history, completion and pasted text, by prompt_toolkit.

It is imported only when a terminal is used, as the import takes 0.2 seconds.
"""

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.output import create_output

from vllama_jax.io.paths import cache_directory
from vllama_jax.runtime.interrupts import TERMINATED_EXIT_CODE, release_signals

EXIT_HINT = "Ctrl-D or /exit ends the chat."


def read_lines(
    commands: Sequence[str], file_commands: Sequence[str], show_message: Callable[[str], None]
) -> Iterator[str]:
    """Read lines from the terminal until Ctrl-D. Pasted text is one line, even if it has line breaks.

    Lines are kept in the cache folder, as the history of later chats. Ctrl-C clears the line.

    Args:
        commands: The words that the Tab key completes at the start of a line.
        file_commands: Those of them after which it completes paths.
        show_message: Prints a line.

    Yields:
        The lines, without a final line break.
    """
    store, lines = _open_history(show_message)
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory(lines),
        completer=_Completer(commands, file_commands),
        complete_while_typing=False,
        output=None if sys.stdout.isatty() else create_output(sys.stderr),
    )
    while True:
        try:
            with release_signals():
                line = session.prompt("> ", pre_run=_exit_on_sigterm)
        except KeyboardInterrupt:
            if not session.default_buffer.text:
                show_message(EXIT_HINT)
            continue
        except EOFError:
            return
        if line.strip() and store is not None:
            try:
                store.store_string(line)
            except OSError as error:
                show_message(f"vllama: the history is not kept ({error.strerror}: {store.filename!r})")
                store = None
        yield line


def _exit_on_sigterm() -> None:
    """Make SIGTERM end the prompt that starts, which restores the terminal, and then the process."""
    app = get_app()

    def exit_app() -> None:
        if not app.is_done:
            app.exit(exception=SystemExit(TERMINATED_EXIT_CODE))

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, exit_app)


def _open_history(show_message: Callable[[str], None]) -> tuple[FileHistory | None, list[str]]:
    """Return the file of the history and its lines, the oldest first; None if the file cannot be used."""
    try:
        path = cache_directory() / "chat_history"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        store = FileHistory(path)
        return store, list(store.load_history_strings())[::-1]
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        show_message(f"vllama: the history is not kept ({error})")
        return None, []


class _Completer(Completer):
    """Completes commands, and paths after commands that take a file."""

    def __init__(self, commands: Sequence[str], file_commands: Sequence[str]):
        self._commands = WordCompleter(list(commands), sentence=True)
        self._paths = PathCompleter(expanduser=True)
        self._file_commands = file_commands

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Yield the completions of the text before the cursor; none of a question."""
        text = document.text_before_cursor
        command, space, path = text.partition(" ")
        if space and command in self._file_commands:
            yield from self._paths.get_completions(Document(path), complete_event)
        elif text.startswith("/"):
            yield from self._commands.get_completions(document, complete_event)
