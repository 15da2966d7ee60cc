"""Signals that end a run after a checkpoint: SIGTERM, as a scheduler sends it, and Ctrl-C.

Of several processes, all have to save at the same step. JAX's preemption service handles SIGTERM there: it tells all
processes which step that is, whichever of them received the signal. A handler of ours would take its place.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax

from vllama_jax.runtime.interrupts import SavedInterrupt, defer_interrupt


class StopSignals:
    """What the steps of a run ask: whether to save and stop. Made by `stop_requests`."""

    def __init__(self, stack: contextlib.ExitStack):
        self._stack = stack
        self._terminated = stack.enter_context(_catch_sigterm()) if jax.process_count() == 1 else threading.Event()
        self._interrupted: threading.Event | None = None

    def catch_interrupts(self) -> None:
        """From now on Ctrl-C saves. Before the first step there is nothing to save, and it ends the process."""
        if self._interrupted is None:
            self._interrupted = self._stack.enter_context(defer_interrupt())

    def should_stop(self, step: int) -> bool:
        """Whether the run saves and stops after this step; all processes get the same answer at each step."""
        interrupted = self._interrupted is not None and self._interrupted.is_set()
        if jax.process_count() == 1:
            return interrupted or self._terminated.is_set()
        from jax.experimental import multihost_utils

        if interrupted and not self._terminated.is_set():
            self._terminated.set()
            os.kill(os.getpid(), signal.SIGTERM)  # as a notice to the preemption service, for all processes
        return multihost_utils.reached_preemption_sync_point(step)

    def raise_if_interrupted(self) -> None:
        """Raise SavedInterrupt where it was Ctrl-C that stopped the run."""
        if self._interrupted is not None and self._interrupted.is_set():
            raise SavedInterrupt


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopSignals]:
    """Note signals while the steps of a run go on."""
    with contextlib.ExitStack() as stack:
        yield StopSignals(stack)


@contextlib.contextmanager
def _catch_sigterm() -> Iterator[threading.Event]:
    """The event that SIGTERM sets; a second one ends the process. Python handles signals in the main thread only."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        received.set()
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
