"""A fake judge on this machine: an OpenAI-compatible endpoint with configurable replies."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[int, dict[str, Any]], tuple]


def make_completion(text: str) -> tuple[int, Any]:
    """Return a chat completion with this text."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


class FakeJudge:
    """A judge whose replies a function determines.

    `reply` maps the index of a request and its body to a status, a body (text is sent as it is, other values as JSON)
    and optionally headers. At most 200 requests are served.
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
def serve_judge(reply: Reply) -> Iterator[FakeJudge]:
    """Serve a fake judge at its `url` within the block."""
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
