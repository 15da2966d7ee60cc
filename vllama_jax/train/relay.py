"""A relay between JAX and process 0 of a job, which detects the loss of process 0 before JAX does.

JAX ends a process from C++, with a stack trace, as soon as its connection to process 0 breaks. The connection to the
relay does not break. The relay is a separate process: JAX holds Python's global interpreter lock while it waits for
replies, so a thread could not always forward them.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

WATCH_SECONDS = 1.0
EXIT_GRACE_SECONDS = 10.0  # seconds that a process has to end by itself after the report
LOST = "lost\n"


class Relay:
    """A running relay, used by the process that connects through it.

    Attributes:
        address: The address that JAX connects to instead of the coordinator's, "host:port".
    """

    def __init__(self, coordinator: str, on_loss: Callable[[], None]):
        """Start the relay process.

        Args:
            coordinator: The address of process 0, "host:port".
            on_loss: Called in a thread when process 0 is lost, after `watch` was called with a timeout.
        """
        program = f"import sys; sys.path[:] = {sys.path!r}; from vllama_jax.train import relay; relay.main()"
        host, _, port = coordinator.rpartition(":")
        # A separate process group, so that Ctrl-C in a terminal reaches the command only. The relay ends with it.
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, host.strip("[]"), port],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._commands, self._reports = self._process.stdin, self._process.stdout
        self.address = f"127.0.0.1:{int(self._reports.readline())}"
        self._on_loss = on_loss
        threading.Thread(target=self._listen, daemon=True, name="vllama-relay").start()

    def watch(self, silence_timeout: float) -> None:
        """Report process 0 as lost if a connection to it ends, or if it is silent for too long.

        Args:
            silence_timeout: Seconds without data from process 0. 0 stops watching: connections may end.
        """
        self._commands.write(f"{silence_timeout}\n")
        self._commands.flush()

    def stop(self) -> None:
        """End the relay process and all connections through it."""
        self._process.kill()
        self._process.wait()
        self._commands.close()

    def _listen(self) -> None:
        with self._reports as reports:
            if LOST in reports:
                self._on_loss()


class _Connections:
    """The connections of the relay process."""

    def __init__(self, coordinator: tuple[str, int]):
        self._coordinator = coordinator
        self._parent = os.getppid()
        self._last_received = time.monotonic()
        self.silence_timeout = 0.0  # 0 while connections may end

    def serve(self, listener: socket.socket) -> None:
        """Accept connections, and forward each to the coordinator."""
        while True:
            client, _ = listener.accept()
            try:
                server = socket.create_connection(self._coordinator, timeout=WATCH_SECONDS)
            except OSError:  # process 0 has not started yet: JAX tries again
                client.close()
                continue
            server.settimeout(None)
            _start(self._forward_requests, client, server)
            _start(self._forward_replies, server, client)

    def _forward_requests(self, client: socket.socket, server: socket.socket) -> None:
        """Forward data from the process to the coordinator."""
        with contextlib.suppress(OSError):
            while data := client.recv(2**16):
                server.sendall(data)
            server.shutdown(socket.SHUT_RDWR)

    def _forward_replies(self, server: socket.socket, client: socket.socket) -> None:
        """Forward data from the coordinator to the process, until one of them closes its connection."""
        while data := self._receive(server):
            self._last_received = time.monotonic()
            try:
                client.sendall(data)
            except OSError:  # the process has ended, and so will the relay
                return
        if self.silence_timeout:
            self._report_loss()
        with contextlib.suppress(OSError):  # `close` alone waits for the thread that reads from it
            client.shutdown(socket.SHUT_RDWR)
        client.close()

    def _receive(self, server: socket.socket) -> bytes:
        """Receive data from the coordinator. Return b"" if it closed the connection or is silent for too long."""
        while not self.silence_timeout or time.monotonic() - self._last_received < self.silence_timeout:
            if select.select([server], [], [], WATCH_SECONDS)[0]:
                with contextlib.suppress(OSError):
                    return server.recv(2**16)
                break
        return b""

    def _report_loss(self) -> None:
        """Report the loss to the process, and kill it if it does not end: it may wait for a reply with the GIL held."""
        with contextlib.suppress(OSError):
            sys.stdout.write(LOST)
            sys.stdout.flush()
        time.sleep(EXIT_GRACE_SECONDS)
        if os.getppid() == self._parent:
            os.kill(self._parent, signal.SIGKILL)


def main() -> None:
    """Run the relay process until stdin is closed. Each line of stdin is a `silence_timeout` of `Relay.watch`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connections = _Connections((sys.argv[1], int(sys.argv[2])))
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    _start(connections.serve, listener)
    for line in sys.stdin:
        connections.silence_timeout = float(line)
    os._exit(0)


def _start(target: Callable[..., None], *arguments: socket.socket) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()
