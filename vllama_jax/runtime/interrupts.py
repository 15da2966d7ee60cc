"""Handle Ctrl-C so that it always ends a command within seconds.

Python raises KeyboardInterrupt in the main thread when that thread next runs Python code. While it compiles or restores
weights, that can take minutes, and an exception that is raised in a destructor or in a library's callback is dropped.
Therefore the signal also wakes a thread, which ends the process if the exception does not.

Native code that calls Python may crash if the call raises: the import of jaxlib ends with SIGABRT, MLIR with SIGSEGV.
Therefore KeyboardInterrupt is raised in the caller of an import or of JAX, when it returns.
"""

import contextlib
import functools
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

EXIT_CODE = 130  # by convention, of a program that SIGINT ended
TERMINATED_EXIT_CODE = 143  # by convention, of a program that SIGTERM ended
GRACE_SECONDS = 3.0  # after Ctrl-C, to remove partial files and wait for threads
CALLING_NATIVE_CODE = ("importlib._bootstrap", "jax", "jaxlib")  # modules whose native code calls Python

_received = threading.Event()
_deferred = threading.Event()


class SavedInterrupt(KeyboardInterrupt):
    """Ctrl-C, raised after the interrupted work has been saved."""


@contextlib.contextmanager
def exit_on_interrupt(until_exit: bool = False) -> Iterator[None]:
    """Exit with code 130 within seconds of Ctrl-C, without a traceback, or immediately on a second Ctrl-C.

    KeyboardInterrupt is raised in the body of the context, so that it can remove its partial files: at once, or after
    the call of JAX or the import that is running. Outside of the main thread this context has no effect.

    Args:
        until_exit: Whether the process ends after the body. Then Ctrl-C while Python exits also gives code 130, without
            the traceback of an interpreter that is interrupted while it waits for threads.
    """
    if not _is_main_thread():
        yield
        return
    _received.clear()
    with _watch_signals(_make_watcher()):
        previous_handler = signal.signal(signal.SIGINT, _interrupt)
        previous_hooks = sys.unraisablehook, sys.excepthook, threading.excepthook
        sys.unraisablehook, sys.excepthook, threading.excepthook = (
            functools.partial(_report_unless_interrupted, hook) for hook in previous_hooks
        )
        try:
            yield
        except SystemExit as end:
            if _received.is_set() and isinstance(end.code, str) and not _is_caused_by_interrupt(end):
                print(end.code, file=sys.stderr)  # an error after Ctrl-C, such as a checkpoint that could not be saved
                exit_now(1)
            raise
        finally:
            if _received.is_set():
                with contextlib.suppress(OSError, ValueError):  # the reader of the pipe has exited
                    sys.stdout.flush()
                exit_now()  # sys.exit would wait for threads, and crash in those that still run native code
            sys.unraisablehook, sys.excepthook, threading.excepthook = previous_hooks
            signal.signal(signal.SIGINT, _exit_on_signal if until_exit else previous_handler)


@contextlib.contextmanager
def defer_interrupt() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets instead of raising KeyboardInterrupt. A second Ctrl-C still ends the process."""
    interrupted = threading.Event()
    if not _is_main_thread():
        yield interrupted
        return

    def set_event(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            exit_now()
        _received.set()
        interrupted.set()

    previous_handler = signal.signal(signal.SIGINT, set_event)
    _deferred.set()
    try:
        yield interrupted
    finally:
        _deferred.clear()
        signal.signal(signal.SIGINT, previous_handler)


@contextlib.contextmanager
def catch_interrupts(on_interrupt: Callable[[], None]) -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets instead of ending the command, which can clear it and continue.

    Ctrl-C while the event is set ends the process at once. So does SIGTERM, with code 143. Outside of the main thread
    this context has no effect.

    Args:
        on_interrupt: A function that is called in another thread, before the event is set.
    """
    interrupted = threading.Event()
    if not _is_main_thread():
        yield interrupted
        return

    def on_signal(number: int) -> None:
        if number == signal.SIGTERM:
            exit_now(TERMINATED_EXIT_CODE)
        if number == signal.SIGINT:
            if interrupted.is_set():
                exit_now()
            on_interrupt()
            interrupted.set()

    with _watch_signals(on_signal), _handle(signal.SIGINT, _ignore), _handle(signal.SIGTERM, _ignore):
        yield interrupted


@contextlib.contextmanager
def release_signals() -> Iterator[None]:
    """Let an event loop handle signals within `catch_interrupts`, as the one of a prompt does.

    asyncio sets the file descriptor that wakes a thread and the handlers of signals, and later the defaults. Both are
    restored at the end. SIGTERM has its default action unless the event loop handles it.
    """
    wakeup_fd = signal.set_wakeup_fd(-1)
    try:
        with _handle(signal.SIGTERM, signal.SIG_DFL):
            yield
    finally:
        signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)


def exit_now(code: int = EXIT_CODE) -> None:
    """End the process immediately, from any thread."""
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(code)


def _is_main_thread() -> bool:
    """Return whether this is the main thread, the only one in which Python handles signals."""
    return threading.current_thread() is threading.main_thread()


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _received.is_set():
        exit_now()
    _received.set()
    caller = _find_caller_of_native_code(frame)
    if caller is None:
        raise KeyboardInterrupt
    caller.f_trace, caller.f_trace_opcodes = _raise_in_frame, True
    sys.settrace(_trace_nothing)  # without a trace function, Python ignores those of frames


def _find_caller_of_native_code(frame: FrameType | None) -> FrameType | None:
    """Return the frame that called the outermost function of CALLING_NATIVE_CODE, or None if none is running."""
    caller = None
    while frame is not None:
        module = f"{frame.f_globals.get('__name__')}."
        if module.startswith(tuple(f"{name}." for name in CALLING_NATIVE_CODE)):
            caller = frame.f_back
        frame = frame.f_back
    return caller


def _raise_in_frame(frame: FrameType, event: str, argument: object) -> None:
    sys.settrace(None)
    raise KeyboardInterrupt


def _trace_nothing(frame: FrameType, event: str, argument: object) -> None:
    """Trace no frame that is entered from now on."""


@contextlib.contextmanager
def _handle(number: int, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Set the handler of a signal."""
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing in the main thread, because the thread of `_watch_signals` handles the signal."""


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    exit_now()


def _is_caused_by_interrupt(error: BaseException | None) -> bool:
    """Return whether KeyboardInterrupt is a cause of an error, as in libraries that convert exceptions."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


@contextlib.contextmanager
def _watch_signals(on_signal: Callable[[int], None]) -> Iterator[None]:
    """Call a function in a thread for each signal that Python handles, even while the main thread runs native code."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    previous_wakeup_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    arguments = (read_fd, on_signal)
    threading.Thread(target=_read_signals, args=arguments, daemon=True, name="vllama-interrupts").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_wakeup_fd, warn_on_full_buffer=False)
        os.close(write_fd)


def _read_signals(read_fd: int, on_signal: Callable[[int], None]) -> None:
    """Read the numbers of signals from a pipe until it is closed, and call a function with each."""
    with open(read_fd, "rb", buffering=0) as signals:
        while numbers := signals.read(64):
            for number in numbers:
                on_signal(number)


def _make_watcher() -> Callable[[int], None]:
    """Return a function for `_watch_signals` that exits on the second SIGINT, or when the grace period is over."""
    count = itertools.count(1)

    def on_signal(number: int) -> None:
        if number != signal.SIGINT:
            return
        if next(count) > 1:
            exit_now()
        if not _deferred.is_set():
            timer = threading.Timer(GRACE_SECONDS, exit_now)
            timer.daemon = True
            timer.start()

    return on_signal


def _report_unless_interrupted(report: Callable[..., object], *error: Any) -> None:
    """Call a hook for an exception that nothing catches, unless Ctrl-C ends the command.

    Then threads fail because the work of the main thread has ended: those of TensorStore, whose event loop is closed.
    """
    if not _received.is_set() or _deferred.is_set():
        report(*error)
