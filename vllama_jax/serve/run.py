"""Run the server: listen, answer until a signal, then finish what runs and refuse what comes."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import uvicorn

from vllama_jax.errors import VllamaError, format_os_error
from vllama_jax.runtime.interrupts import EXIT_CODE, TERMINATED_EXIT_CODE, defer_interrupt, exit_now
from vllama_jax.serve.app import make_app
from vllama_jax.serve.options import KEY_VARIABLE, ServeOptions
from vllama_jax.serve.service import Service

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_BACKLOG = 2048  # connections that wait to be accepted, as uvicorn's default
_CLOSE_SECONDS = 5  # for connections to close, after the answers have ended


class ServerError(VllamaError):
    """The server cannot listen, or its engine has failed."""


def open_socket(options: ServeOptions) -> socket.socket:
    """Listen on the address of the options. Warn if others can use the server without a key.

    Raises:
        ServerError: The address cannot be used.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, socket.SOCK_STREAM)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            opened.listen(_BACKLOG)
        except OSError:
            opened.close()
            raise
    except OSError as error:
        why = error.strerror or format_os_error(error)
        raise ServerError(
            f"{options.host}:{options.port}: cannot listen there ({why}); choose another --host or --port"
        ) from error
    opened.setblocking(False)
    return opened


def get_url(opened: socket.socket) -> str:
    """Return the URL of a socket that listens."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def warn_if_open(options: ServeOptions, keys: tuple[str, ...]) -> None:
    """Log a warning if other machines can connect, and no API key is needed."""
    if not options.is_local and not keys:
        logger.warning(
            f"everyone who can connect to {options.host} can use this server: set --api-key-file or {KEY_VARIABLE}"
        )


def run_server(service: Service, opened: socket.socket, on_ready: Callable[[], None]) -> None:
    """Answer requests until Ctrl-C or SIGTERM.

    Then new requests get status 503, and running ones have `shutdown_seconds` to end. A second Ctrl-C ends at once.

    Args:
        service: The service.
        opened: A socket that listens.
        on_ready: Called when requests are answered.

    Raises:
        ServerError: The engine has failed.
    """
    with defer_interrupt() as interrupted, _catch_sigterm() as terminated:
        asyncio.run(serve_until(service, opened, on_ready, (interrupted, terminated)))
    if service.is_compiling:  # Python would wait for it
        exit_now(EXIT_CODE if interrupted.is_set() else TERMINATED_EXIT_CODE)
    if "failed" in (service.scheduler.status, service.media.status):
        raise ServerError("the model has failed, as logged above; start the server again")


class _Server(uvicorn.Server):
    """A server of uvicorn that leaves signals to the caller."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


async def serve_until(
    service: Service,
    opened: socket.socket,
    on_ready: Callable[[], None],
    events: Sequence[threading.Event],
) -> None:
    """Answer requests until one of the events is set or the engine fails, then finish what runs; see `run_server`."""
    config = uvicorn.Config(
        make_app(service),
        http="h11",  # limits the size of headers; httptools, which uvicorn would prefer if installed, does not
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    server = _Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[opened]))
    is_ready = False
    while not serving.done() and not any(event.is_set() for event in events):
        if service.status == "failed":
            break
        if service.status == "ready" and not is_ready:
            is_ready = True
            on_ready()
        await asyncio.sleep(_POLL_SECONDS)
    if serving.done():
        raise ServerError("the server could not start; its log has the reason")
    service.is_stopping = True
    deadline = asyncio.get_running_loop().time() + service.options.shutdown_seconds
    while service.limits.used("answers") and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
    server.should_exit = True
    await serving


@contextlib.contextmanager
def _catch_sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets."""
    terminated = threading.Event()

    def set_event(number: int, frame: FrameType | None) -> None:
        terminated.set()

    previous = signal.signal(signal.SIGTERM, set_event)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, previous)
