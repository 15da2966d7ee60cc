"""Ctrl-C: how it ends a command, whatever the command is doing.

Python raises KeyboardInterrupt in the main thread once that thread runs Python code again. A thread that compiles or
restores weights does so only minutes later, and an exception raised in a destructor or in a library's callback is
dropped. So the signal also wakes a thread, which ends the process where the exception did not.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

EXIT_CODE = 130  # as a shell reports a program that SIGINT ended
GRACE_SECONDS = 3.0  # seconds from Ctrl-C for removing partial files and waiting for threads

_received = threading.Event()
_deferred = threading.Event()


class SavedInterrupt(KeyboardInterrupt):
    """Ctrl-C, raised once the work it interrupted has been saved."""


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """End the process with exit code 130 within seconds of Ctrl-C, without a traceback; at once on a second one.

    The body gets KeyboardInterrupt, so that it removes its partial files. Does nothing outside of the main thread.
    """
    if not _is_main_thread():
        yield
        return
    _received.clear()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    woken_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handler_before = signal.signal(signal.SIGINT, _interrupt)
    hook_before = sys.unraisablehook
    sys.unraisablehook = functools.partial(_report_unraisable, hook_before)
    threading.Thread(target=_watch_signals, args=(reading,), daemon=True, name="vllama-interrupts").start()
    try:
        yield
    except SystemExit as end:
        if _received.is_set() and isinstance(end.code, str) and not _is_caused_by_interrupt(end):
            print(end.code, file=sys.stderr)  # what was asked for has failed: a checkpoint could not be saved
            exit_now(1)
        raise
    finally:
        if _received.is_set():
            with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
                sys.stdout.flush()
            exit_now()  # sys.exit would wait for threads, and crash in those that still run native code
        sys.unraisablehook = hook_before
        signal.signal(signal.SIGINT, handler_before)
        signal.set_wakeup_fd(woken_before)
        os.close(writing)


@contextlib.contextmanager
def defer_interrupt() -> Iterator[threading.Event]:
    """The event that Ctrl-C sets in place of raising KeyboardInterrupt. A second Ctrl-C still ends the process."""
    asked = threading.Event()
    if not _is_main_thread():
        yield asked
        return

    def note(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            exit_now()
        _received.set()
        asked.set()

    before = signal.signal(signal.SIGINT, note)
    _deferred.set()
    try:
        yield asked
    finally:
        _deferred.clear()
        signal.signal(signal.SIGINT, before)


def exit_now(code: int = EXIT_CODE) -> None:
    """End the process, from any thread, without waiting for anything."""
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(code)


def _is_main_thread() -> bool:
    """Python handles signals in the main thread only."""
    return threading.current_thread() is threading.main_thread()


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _received.is_set():
        exit_now()
    _received.set()
    raise KeyboardInterrupt


def _is_caused_by_interrupt(error: BaseException | None) -> bool:
    """Whether KeyboardInterrupt led to an error, as where a library reports it in its own way."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _watch_signals(reading: int) -> None:
    """Count the signals that arrive in a pipe, until it is closed."""
    count = 0
    with open(reading, "rb", buffering=0) as signals:
        while numbers := signals.read(64):
            for _ in range(numbers.count(signal.SIGINT)):
                count += 1
                if count > 1:
                    exit_now()
                if not _deferred.is_set():
                    timer = threading.Timer(GRACE_SECONDS, exit_now)
                    timer.daemon = True
                    timer.start()


def _report_unraisable(report: Callable[[Any], None], unraisable: "sys.UnraisableHookArgs") -> None:
    """Report an exception that nothing could catch, but for the KeyboardInterrupt that the thread makes up for."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        report(unraisable)
