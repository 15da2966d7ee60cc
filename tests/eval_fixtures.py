"""A judge on this machine: an OpenAI-compatible endpoint that answers as it is told to."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[int, dict[str, Any]], tuple]


def completion(text: str) -> tuple[int, Any]:
    """A chat completion with this text."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


class FakeJudge:
    """reply: which request it is, from 0 on, and its body → status, what is sent (texts as they are, all else as
    JSON) and, where there are some, its headers. At most 200 requests.
    """

    def __init__(self, reply: Reply):
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self._reply, self._lock = reply, threading.Lock()

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple:
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.paths.append(path)
            self.keys.append(headers.get("Authorization"))
            self.headers.append(headers)
        return self._reply(number, body) if number < 200 else (500, {})


@contextlib.contextmanager
def serving(reply: Reply) -> Iterator[FakeJudge]:
    """A fake judge, at `url` until the end of the block."""
    judge = FakeJudge(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, sent, *more = judge.answer(self.path, dict(self.headers), body)
            data = (sent if isinstance(sent, str) else json.dumps(sent)).encode()
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | (more[0] if more else {})).items():
                self.send_header(name, value)
            if status in (301, 302, 307):
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02})
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
