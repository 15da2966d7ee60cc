"""Signals that end a run after saving a checkpoint: SIGTERM, as a scheduler sends it, and Ctrl-C.

Several processes must save at the same step. JAX's preemption service handles SIGTERM in this case: it chooses the step
for all processes, whichever of them received the signal. A signal handler of this module would replace the service's.
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
    """The stop signals that a run has received. Created by `catch_stop_signals`."""

    def __init__(self, stack: contextlib.ExitStack):
        self._stack = stack
        self._terminated = stack.enter_context(_catch_sigterm()) if jax.process_count() == 1 else threading.Event()
        self._interrupted: threading.Event | None = None

    def catch_interrupts(self) -> None:
        """Catch Ctrl-C from now on. Before the first step it ends the process, as there is nothing to save."""
        if self._interrupted is None:
            self._interrupted = self._stack.enter_context(defer_interrupt())

    def should_stop(self, step: int) -> bool:
        """Return whether to save and stop after `step`. All processes must call this after each step and agree."""
        interrupted = self._interrupted is not None and self._interrupted.is_set()
        if jax.process_count() == 1:
            return interrupted or self._terminated.is_set()
        from jax.experimental import multihost_utils

        if interrupted and not self._terminated.is_set():
            self._terminated.set()
            os.kill(os.getpid(), signal.SIGTERM)  # notifies the preemption service of all processes
        return multihost_utils.reached_preemption_sync_point(step)

    def raise_if_interrupted(self) -> None:
        """Raise SavedInterrupt if Ctrl-C stopped the run."""
        if self._interrupted is not None and self._interrupted.is_set():
            raise SavedInterrupt


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopSignals]:
    """Catch SIGTERM during the steps of a run, and Ctrl-C after `catch_interrupts` was called."""
    with contextlib.ExitStack() as stack:
        yield StopSignals(stack)


@contextlib.contextmanager
def _catch_sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets. A second SIGTERM ends the process.

    Outside the main thread the event is never set, because Python handles signals in the main thread only.
    """
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
