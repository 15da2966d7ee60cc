"""What `vllama serve` refuses: errors have a status, an object as OpenAI's, and no path."""

import asyncio
import json
import os
import socket
import time

import httpx
import openai
import pebble
import pytest
from PIL import Image
from serve_fixtures import RunningServer, data_url, decode_forever, part, run_server, user

import vllama_jax as vl
from vllama_jax.checkpoints.shipped import CLIPS, find_clip
from vllama_jax.media import download
from vllama_jax.serve import decoding, gate, protocol
from vllama_jax.serve.options import MEBIBYTE

pytestmark = pytest.mark.slow  # a server takes seconds to start

CLIP = find_clip("demo")
VIDEO = part("video_url", data_url(CLIP))
KEYS = ("key-of-one-user", "key-of-another")
HEADERS = {"Authorization": f"Bearer {KEYS[0]}"}
PICTURE = part("image_url", data_url(CLIPS / "birds.jpg"))
HELLO = {"messages": [{"role": "user", "content": "Hello?"}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("allowed")
    (folder / "clip.mp4").write_bytes(CLIP.read_bytes())
    (folder / "link.mp4").symlink_to(CLIP)
    (folder / "inside.mp4").symlink_to(folder / "clip.mp4")
    options = {
        "allow_files": folder,
        "allow_domains": ("media.example,other.example", "127.0.0.1"),
        "max_waiting": 2,
        "max_body_megabytes": 2,
        "max_file_megabytes": 1,
        "max_files_megabytes": 2,
        "max_frames": 40,
        "decode_seconds": 3.0,
        "decode_megabytes": 150,
    }
    with run_server(vl.load("miniature"), KEYS, **options) as running:
        yield running


def refuse(server: RunningServer, body: dict | bytes, route: str = "chat/completions", **options) -> tuple[int, dict]:
    """Return the status and the error of a request that is refused."""
    response = server.post(body, route, **({"headers": HEADERS} | options))
    assert response.status_code >= 400, response.text
    error = response.json()["error"]
    assert {*error} == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    assert "/proc" not in error["message"]
    assert "/tmp" not in error["message"]
    assert str(CLIPS) not in error["message"]
    return response.status_code, error


def check_answers(server: RunningServer) -> None:
    response = server.post({"messages": [user(VIDEO, "Describe it.")]}, headers=HEADERS)
    assert response.json()["choices"][0]["message"]["content"] == "a large yellow bell moves to the left"


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "must be the user's"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "'user'"),
        ({"messages": [user({"type": "movie"})]}, "messages[0].content[0]", "image_url"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "messages", "continue_final_message"),
        ({"messages": [{"role": "system", "content": [VIDEO]}, user("a")]}, "messages[0].content[0]", "only text"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 65}, "max_tokens", "at most 64"),
        ({"n": 99}, "n", "less than or equal"),
        ({"top_k": 2**40}, "top_k", "less than or equal"),  # it would not fit the engine's arrays
        ({"no_repeat_ngram_size": 10**9}, "no_repeat_ngram_size", "less than or equal"),
        ({"stop": [""]}, None, "empty"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"use_beam_search": True}, "use_beam_search", "beam search"),
        ({"tools": [{"type": "function"}]}, "tools", "no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "only text"),
        ({"top_logprobs": 3}, "top_logprobs", "set logprobs"),
        ({"messages": [user("word " * 180)]}, "messages", "--prompt-tokens"),
        ({"messages": [user("a" * 20000)]}, "messages", "characters"),
        ({"media_io_kwargs": {"video": {"num_frames": 2, "fps": 1}}, "messages": [user(VIDEO)]}, None, "fps"),
        ({"media_io_kwargs": {"video": {"num_frames": 9}}, "messages": [user(VIDEO)]}, None, "learned frame positions"),
        ({"messages": [user(part("video_url", "https://evil.example/a.mp4"))]}, None, "not allowed"),
        ({"messages": [user(part("video_url", "http://media.example/a.mp4"))]}, None, "use https"),
        ({"messages": [user(part("video_url", "ftp://media.example/a.mp4"))]}, None, "data:"),
        ({"messages": [user(part("video_url", "/etc/passwd"))]}, None, "data:"),
        ({"messages": [user(part("video_url", "data:video/mp4;base64,%%%"))]}, None, "base64"),
        ({"messages": [user(part("video_url", "data:video/mp4;base64,"))]}, None, "empty"),
        ({"messages": [user(part("video_url", "file:///etc/passwd"))]}, None, "--allow-files"),
    ],
)
def test_an_invalid_request_has_status_400(server, change, param, message):
    status, error = refuse(server, HELLO | change)
    assert (status, error["type"]) == (400, "invalid_request_error"), error
    assert message in error["message"]
    assert param is None or error["param"] == param


def test_other_bodies_that_are_not_requests(server):
    assert refuse(server, b"{", headers=HEADERS | {"Content-Type": "application/json"})[0] == 400
    assert refuse(server, json.dumps(HELLO).encode(), headers=HEADERS | {"Content-Type": "text/plain"})[0] == 415
    assert refuse(server, HELLO, "movies")[0] in (404, 405)
    assert refuse(server, HELLO | {"model": "gpt-4"})[1]["code"] == "model_not_found"
    assert refuse(server, {"prompt": [99999999]}, "completions")[0] == 400
    assert refuse(server, {"prompt": "a", "echo": True}, "completions")[0] == 400
    assert refuse(server, {"input": []}, "embeddings")[0] == 400


def test_keys(server, caplog):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEYS[0]}, {"X-Api-Key": KEYS[0]}):
        status, error = refuse(server, HELLO, headers=headers)
        assert (status, error["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()
    assert [one.id for one in openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[1]).models.list()]
    assert not any(key in caplog.text for key in (*KEYS, "wrong"))


def test_pages_of_other_origins_and_other_host_names_are_refused(server):
    assert refuse(server, HELLO, headers=HEADERS | {"Origin": "https://evil.example"})[0] == 403
    assert refuse(server, HELLO, headers=HEADERS | {"Host": "evil.example:8000"})[0] == 403
    assert server.post(HELLO, headers=HEADERS | {"Origin": server.url}).status_code == 200


def test_files_outside_of_the_allowed_directory_are_refused(server):
    folder = server.service.options.allow_files
    for path in ("clip.mp4", "inside.mp4"):
        body = {"messages": [user(part("video_url", f"file://{folder}/{path}"), "Describe it.")]}
        assert server.post(body, headers=HEADERS).status_code == 200
    os.mkfifo(folder / "fifo")
    for path in ("link.mp4", "../../etc/passwd", "none.mp4", "", "fifo", "%00", "clip.mp4/.."):
        status, error = refuse(server, {"messages": [user(part("video_url", f"file://{folder}/{path}"))]})
        assert status == 400
        assert "--allow-files" in error["message"]
    assert refuse(server, {"messages": [user(part("video_url", f"file://host{folder}/clip.mp4"))]})[0] == 400


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1", "64:ff9b::a00:1"]
)
def test_urls_of_private_addresses_are_not_fetched(server, monkeypatch, address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = [(family, socket.SOCK_STREAM, 6, "", (address, 443))]
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: found if host == "media.example" else resolve(host, *a, **k)
    )
    monkeypatch.setattr(download, "_dial", lambda *_: pytest.fail("dialed"))
    status, error = refuse(server, {"messages": [user(part("video_url", "https://media.example/a.mp4?token=1"))]})
    assert status == 400
    assert "not public" in error["message"]
    assert address not in error["message"]
    assert "token" not in error["message"]
    assert refuse(server, {"messages": [user(part("video_url", "https://127.0.0.1/a.mp4"))]})[0] == 400


def test_redirects_leave_allowed_hosts_for_none(server, monkeypatch):
    """The first host is public and allowed; where it redirects to is checked again."""
    monkeypatch.setattr(download, "_resolve", lambda host, port: ["93.184.215.14"])
    dialed, held = [], []

    def dial(address, port, name, timeout):
        ours, theirs = socket.socketpair()
        dialed.append(port)
        held.append(theirs)
        theirs.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://evil.example:81/a.mp4\r\nContent-Length: 0\r\n\r\n")
        return ours

    monkeypatch.setattr(download, "_dial", dial)
    monkeypatch.setattr(download.ssl.SSLContext, "wrap_socket", lambda self, connection, **_: connection)
    status, error = refuse(server, {"messages": [user(part("video_url", "https://media.example/a.mp4"))]})
    assert status == 400
    assert dialed == [443]
    assert "redirect" in error["message"]
    assert "evil" not in error["message"]


def test_bodies_and_files_that_are_too_large(server):
    huge = {"messages": [user(part("video_url", data_url(bytes(3 * MEBIBYTE))))]}
    assert refuse(server, huge)[0] == 413

    def chunks():
        for _ in range(40):
            yield b"a" * 65536

    sent = httpx.post(
        f"{server.url}/v1/chat/completions", content=chunks(), headers=HEADERS | {"Content-Type": "application/json"}
    )
    assert sent.status_code == 413
    status, error = refuse(server, {"messages": [user(*[VIDEO] * 6)]})
    assert status == 413
    assert "48" in error["message"]
    upload = {"file": ("a.mp4", bytes(MEBIBYTE + 1))}
    response = httpx.post(f"{server.url}/v1/files", files=upload, headers=HEADERS)
    assert response.status_code == 413
    kept = [httpx.post(f"{server.url}/v1/files", files={"file": bytes(900_000)}, headers=HEADERS) for _ in range(3)]
    assert [one.status_code for one in kept] == [200, 200, 429]
    assert "Retry-After" in kept[2].headers
    other = {"Authorization": f"Bearer {KEYS[1]}"}
    assert httpx.get(f"{server.url}/v1/files", headers=other).json()["data"] == []
    file_id = kept[0].json()["id"]
    assert httpx.delete(f"{server.url}/v1/files/{file_id}", headers=other).status_code == 404
    for one in kept[:2]:
        assert httpx.delete(f"{server.url}/v1/files/{one.json()['id']}", headers=HEADERS).status_code == 200
    assert not list(server.service.uploads._folder.iterdir())
    assert server.service.uploads._bytes == 0


def test_forms_that_are_broken(server):
    headers = HEADERS | {"Content-Type": "multipart/form-data; boundary=b"}
    start = b'--b\r\nContent-Disposition: form-data; name="file"; filename="../../a.mp4"\r\n\r\n'
    for content, status in (
        (start + b"data", 400),
        (b"no form", 400),
        (b"--b--\r\n", 400),
        (start + b"x\r\n" + start + b"y\r\n--b--\r\n", 400),
    ):
        assert httpx.post(f"{server.url}/v1/files", content=content, headers=headers).status_code == status
    assert httpx.post(f"{server.url}/v1/files", json={}, headers=HEADERS).status_code == 415
    long = HEADERS | {"Content-Type": f"multipart/form-data; boundary={'b' * 300}"}
    assert httpx.post(f"{server.url}/v1/files", content=b"a", headers=long).status_code == 400
    accepted = httpx.post(f"{server.url}/v1/files", content=start + b"x\r\n--b--\r\n", headers=headers).json()
    assert accepted["filename"] == "a.mp4"
    refused = refuse(server, {"messages": [user({"type": "file", "file": {"file_id": accepted["id"]}})]})
    assert refused[0] == 415
    httpx.delete(f"{server.url}/v1/files/{accepted['id']}", headers=HEADERS)
    assert not list(server.service.uploads._folder.iterdir())


def test_files_of_other_kinds_and_hostile_files_cost_one_request(server, tmp_path, monkeypatch):
    status, error = refuse(server, {"messages": [user(part("video_url", data_url(b"not a video" * 9)))]})
    assert status == 415
    assert error["param"] == "messages[0].content[0]"
    status, error = refuse(server, {"messages": [user(part("image_url", VIDEO["video_url"]["url"]))]})
    assert status == 415
    assert "video_url" in error["message"]
    truncated = CLIP.read_bytes()[:30000]
    status, error = refuse(server, {"messages": [user("a", part("video_url", data_url(truncated)))]})
    assert status == 422
    assert "truncated" in error["message"]
    Image.new("RGB", (8000, 8000)).save(tmp_path / "large.png")  # below the limit of pixels; decoded, it has 192 MB
    bomb = {"messages": [user(part("image_url", data_url(tmp_path / "large.png")))]}
    status, error = refuse(server, bomb)
    assert status == 422
    assert "memory" in error["message"] or "MiB" in error["message"]
    with pytest.raises(pebble.ProcessExpired):
        server.service.decoders._pool.schedule(os.abort).result()
    monkeypatch.setattr(server.service.decoders, "_seconds", 0.5)
    monkeypatch.setattr(decoding, "_decode", decode_forever)
    status, error = refuse(server, bomb)
    assert status == 422
    assert "limit of 0.5 s" in error["message"]
    monkeypatch.undo()
    check_answers(server)


def test_a_full_queue_has_status_429(server, monkeypatch):
    """Six answers are possible at a time: four rows and two that wait."""
    request = {"messages": [user("Hello?")], "max_tokens": 64, "min_tokens": 64, "temperature": 2.0}

    async def send_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, headers=HEADERS) as client:
            return await asyncio.gather(
                *(client.post(f"{server.url}/v1/chat/completions", json=request) for _ in range(16))
            )

    responses = asyncio.run(send_all())
    refused = [one for one in responses if one.status_code == 429]
    assert refused
    assert {one.status_code for one in responses} == {200, 429}
    assert all(int(one.headers["Retry-After"]) >= 1 for one in refused)
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert refuse(server, request | {"n": 7})[0] == 413
    check_answers(server)


def test_a_body_that_does_not_arrive_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(gate, "IDLE_SECONDS", 0.2)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: {HEADERS['Authorization']}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{".encode()
        )
        assert b" 408 " in slow.recv(4096)


def test_numbers_and_characters_that_are_none_do_not_end_the_engine(server):
    for field in ("temperature", "top_p", "repetition_penalty"):
        body = json.dumps(HELLO | {field: float("nan")}).encode()
        assert refuse(server, body, headers=HEADERS | {"Content-Type": "application/json"})[0] == 400
    headers = HEADERS | {"Content-Type": "application/json"}
    body = json.dumps({"messages": [user({"type": "\ud800"})]}).encode()
    assert refuse(server, body, headers=headers)[0] == 400
    assert server.post(json.dumps({"messages": [user("\ud800")]}).encode(), headers=headers).status_code == 200
    extreme = {"temperature": 1e-300, "repetition_penalty": 1e-300, "seed": -(10**40), "top_k": -5, "max_tokens": 4}
    assert server.post(HELLO | extreme, headers=HEADERS).status_code == 200
    check_answers(server)


def test_unknown_fields_are_ignored_and_logged_once(server, caplog):
    protocol._logged_fields.clear()
    for _ in range(2):
        fields = {"frequency_penalty": 0.5, "presence_penalty": 0, "service_tier": "auto", "user": "me"}
        assert server.post(HELLO | fields, headers=HEADERS).status_code == 200
    logged = [record.getMessage() for record in caplog.records if "not supported" in record.getMessage()]
    assert len([line for line in logged if "frequency_penalty" in line]) == 1
    assert not any("presence_penalty" in line for line in logged)


def test_a_stopped_server_finishes_what_runs_and_refuses_what_comes(server):
    """The last test of the file: it stops the server."""
    request = {"messages": [user("Hello?")], "max_tokens": 64, "min_tokens": 64, "temperature": 2.0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=request, headers=HEADERS) as running:
        lines = running.iter_lines()
        next(lines)
        # One of the answers is held, so that the server waits for it.
        held = server.service.limits.reserve(answers=1)
        with held:
            server.stop.set()
            deadline = time.monotonic() + 5
            while not server.service.is_stopping and time.monotonic() < deadline:
                time.sleep(0.01)
            status, error = refuse(server, HELLO)
            assert status == 503
            assert "stopping" in error["message"]
            assert httpx.get(f"{server.url}/health").json() == {"status": "stopping"}
        received = [line for line in lines if line]
    assert received[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in received[-2]
    server.thread.join(20)
    assert not server.thread.is_alive()
    assert not server.service.uploads._folder.exists()
