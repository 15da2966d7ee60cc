"""A server in a thread of the test process, and its clients."""

import asyncio
import base64
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from vllama_jax.generate import engine
from vllama_jax.model import Model
from vllama_jax.serve.options import ServeOptions
from vllama_jax.serve.run import get_url, open_socket, serve_until
from vllama_jax.serve.service import Service, make_service

SMALL: dict[str, Any] = {"port": 0, "rows": 4, "prompt_tokens": 384, "new_tokens": 64, "decoders": 1}


@dataclasses.dataclass
class RunningServer:
    """A server that answers requests.

    Attributes:
        service: What it serves.
        url: Its address.
        stop: Set to stop it.
        thread: The thread that ends when it has stopped.
    """

    service: Service
    url: str
    stop: threading.Event
    thread: threading.Thread

    def post(self, body: dict[str, Any] | bytes, route: str = "chat/completions", **options: Any) -> httpx.Response:
        """Post a body to a route."""
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return httpx.post(f"{self.url}/v1/{route}", timeout=60, **content, **options)

    def ask(self, *parts: dict[str, Any] | str, **fields: Any) -> dict[str, Any]:
        """Ask a question with content parts, and return the response, which must not be an error."""
        response = self.post({"messages": [user(*parts)], **fields})
        assert response.status_code == 200, response.text
        return response.json()


def decode_forever(job: Any, config: Any) -> None:
    """Decode a file that takes longer than any limit. Called in a decoder."""
    time.sleep(3600)


def user(*parts: dict[str, Any] | str) -> dict[str, Any]:
    """Return a message of the user with content parts; strings are texts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def part(kind: str, url: str) -> dict[str, Any]:
    """Return a content part of a URL, such as `part("video_url", "data:…")`."""
    return {"type": kind, kind: {"url": url}}


def data_url(file: Path | bytes) -> str:
    """Return a file as a data URL."""
    data = file if isinstance(file, bytes) else file.read_bytes()
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"


@contextlib.contextmanager
def run_server(model: Model, keys: tuple[str, ...] = (), **options: Any) -> Iterator[RunningServer]:
    """Run a server until the context ends."""
    chosen = ServeOptions(**(SMALL | options))
    service = make_service(model, "miniature", chosen, keys)
    ready, stop = threading.Event(), threading.Event()
    with open_socket(chosen) as opened, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "CHUNK_LENGTHS", (64, 384))  # two programs to compile instead of six
        url = get_url(opened)
        running = asyncio.run
        thread = threading.Thread(target=lambda: running(serve_until(service, opened, ready.set, (stop,))))
        thread.start()
        try:
            while not ready.wait(0.1):
                assert thread.is_alive(), "the server has ended"
            yield RunningServer(service, url, stop, thread)
        finally:
            stop.set()
            thread.join()
