"""A relay between JAX and process 0 of a job, so that we are the first to learn that process 0 is lost.

JAX ends a process from C++, with a stack trace, as soon as its connection to process 0 breaks. Through the relay that
connection never breaks: this thread sees the end of the other side, and says what happened.
"""

import contextlib
import math
import select
import socket
import threading
import time
from collections.abc import Callable

CHECK_EVERY = 1.0  # seconds


class Relay:
    """Passes on what a process and `coordinator` ("host:port") say to each other.

    on_end: called in a thread of the relay when the coordinator has closed a connection, broken it, or said nothing for
    `longest_silence` seconds.
    """

    longest_silence = math.inf

    def __init__(self, coordinator: str, on_end: Callable[[], None]):
        host, _, port = coordinator.rpartition(":")
        self._coordinator = host.strip("[]"), int(port)
        self._on_end = on_end
        self._heard = time.monotonic()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        _start(self._accept)

    def _accept(self) -> None:
        while True:
            here, _ = self._listener.accept()
            try:
                there = socket.create_connection(self._coordinator, timeout=CHECK_EVERY)
            except OSError:  # process 0 is not there yet: JAX tries again
                here.close()
                continue
            there.settimeout(None)
            _start(self._pass_on, here, there)
            _start(self._pass_back, there, here)

    def _pass_on(self, here: socket.socket, there: socket.socket) -> None:
        """From this process to the coordinator."""
        with contextlib.suppress(OSError):
            while data := here.recv(2**16):
                there.sendall(data)
            there.shutdown(socket.SHUT_RDWR)

    def _pass_back(self, there: socket.socket, here: socket.socket) -> None:
        """From the coordinator to this process."""
        with contextlib.suppress(OSError):
            while time.monotonic() - self._heard < self.longest_silence:
                if select.select([there], [], [], CHECK_EVERY)[0]:
                    data = there.recv(2**16)
                    if not data:
                        break
                    self._heard = time.monotonic()
                    here.sendall(data)
        self._on_end()
        here.close()


def _start(target: Callable[..., None], *arguments: socket.socket) -> None:
    threading.Thread(target=target, args=arguments, daemon=True, name="vllama-relay").start()
