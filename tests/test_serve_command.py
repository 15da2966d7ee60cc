"""`vllama serve` as a command: its errors in one line, and how it ends; its parts without a server."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from cli_fixtures import expect_error_line as expect_error

from vllama_jax.serve.completions import EventStream
from vllama_jax.serve.media_requests import SharedResults
from vllama_jax.serve.options import ServeOptions, read_keys
from vllama_jax.serve.uploads import Uploads


def test_what_prevents_the_server_from_starting_is_one_line(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        assert "choose another --host or --port" in expect_error("serve", "--port", str(port))
    assert "cannot listen there" in expect_error("serve", "--host", "203.0.113.1", "--port", "0")
    assert "cannot be read" in expect_error("serve", "--api-key-file", str(tmp_path / "none"))
    (tmp_path / "keys").write_text("# none\n\n")
    assert "has no API key" in expect_error("serve", "--api-key-file", str(tmp_path / "keys"))
    assert "not a directory" in expect_error("serve", "--allow-files", str(tmp_path / "none"))
    assert "config.json" in expect_error("serve", str(tmp_path), "--port", "0")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "pip install 'vllama-jax[serve]'" in expect_error("serve")


def test_keys_are_read_from_a_file_and_the_environment(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("one\n# two\n\n  three\n")
    monkeypatch.setenv("VLLAMA_API_KEY", "four,five")
    assert read_keys(tmp_path / "keys") == ("four", "five", "one", "three")
    assert ServeOptions(allow_domains=("A.com,b.org", "c.net")).allow_domains == ("a.com", "b.org", "c.net")


def test_uploaded_files_expire():
    async def upload(uploads: Uploads):
        async def chunks():
            yield b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n'

        return await uploads.receive("multipart/form-data; boundary=b", chunks(), "")

    uploads = Uploads(10, 10, seconds=0.001)
    assert asyncio.run(upload(uploads)).bytes == 1
    assert uploads.list("") == []
    assert not list(uploads._folder.iterdir())
    uploads.close()


def test_a_client_that_leaves_before_its_stream_starts_keeps_nothing():
    closed = []

    async def run() -> None:
        async def events():
            yield b"data: 1"

        async def receive() -> dict:
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            await asyncio.sleep(0)

        held = contextlib.ExitStack()
        held.callback(closed.append, True)
        await EventStream(events(), held)({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)

    asyncio.run(run())
    assert closed == [True]


def test_results_are_shared_kept_and_removed():
    computed, sizes = [], SharedResults(10, size=lambda value: value)

    async def get(key: str, value: int, error: bool = False):
        async def compute() -> int:
            computed.append(key)
            await asyncio.sleep(0.01)
            if error:
                raise ValueError(key)
            return value

        return await sizes.get(key, compute)

    async def run() -> None:
        assert await asyncio.gather(get("a", 4), get("a", 4)) == [(4, False), (4, True)]
        failed = await asyncio.gather(get("b", 1, True), get("b", 1, True), return_exceptions=True)
        assert [type(one) for one in failed] == [ValueError, ValueError]
        assert await get("b", 1) == (1, False)
        assert await get("a", 4) == (4, True)
        assert await get("c", 6) == (6, False)  # "b" is the least recently used
        assert await get("a", 4) == (4, True)
        assert await get("b", 1) == (1, False)

    asyncio.run(run())
    assert computed == ["a", "b", "b", "c", "b"]


@pytest.mark.slow
def test_sigterm_finishes_the_running_answer(tmp_path):
    (tmp_path / "keys").write_text("secret\n")
    options = ["--port", "0", "--host", "0.0.0.0", "--rows", "2", "--prompt-tokens", "64", "--new-tokens", "64"]
    command = [sys.executable, "-m", "vllama_jax", "serve", *options, "--decoders", "1"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"served at http://0\.0\.0\.0:(\d+)", line):
                break
        else:
            pytest.fail("".join(lines))
        assert any("everyone who can connect" in line for line in lines)
        request = {"stream": True, "max_tokens": 64, "min_tokens": 64, "messages": [{"role": "user", "content": "?"}]}
        url = f"http://127.0.0.1:{found[1]}/v1/chat/completions"
        with httpx.stream("POST", url, json=request, timeout=60) as response:
            received = response.iter_lines()
            next(received)
            process.send_signal(signal.SIGTERM)
            assert [line for line in received if line][-1] == "data: [DONE]"
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.returncode == 0
        assert process.stderr.read() == ""
    assert not list(tmp_path.glob("vllama-serve-*"))
