"""The parts of `benchmarks/serve.py --chaos`: clients, files and a disk that misbehave.

During each part, other clients ask questions whose answers are known, and the health of the server is polled. After it,
the server must be as before: no answer runs or waits, no file or connection is open, no upload is on the disk.
"""

import asyncio
import base64
import collections
import contextlib
import dataclasses
import json
import random
import resource
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from serve_load import Work, open_client, send

from vllama_jax.checkpoints.shipped import CLIPS

OTHERS = 3  # clients that must not notice anything
KNOWN = 8  # questions that they ask: one of each kind
IDLE_SECONDS = 30.0  # after a part, until nothing of it runs
MOST_GROWTH = 300.0  # MB of a part: caches and XLA's memory pools grow, a leak of every file would be more
KILLED, SLOW, SILENT = 48, 8, 64  # connections
MEBIBYTE = 2**20
BOUNDARY = "boundary"
FORM_START = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'.encode()
FORM_END = f"\r\n--{BOUNDARY}--\r\n".encode()
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
HELLO = b'{"messages": [{"role": "user", "content": "Hello?"}]}'


@dataclasses.dataclass
class Scene:
    """What a part needs.

    Attributes:
        url: The address of the server.
        process: Its process.
        client: A client of it.
        work: Questions.
        folder: Where the server has its temporary files.
        num_files: The number of hostile files.
        problems: What is wrong.
    """

    url: str
    process: psutil.Process
    client: httpx.AsyncClient
    work: Work
    folder: Path
    num_files: int
    problems: list[str] = dataclasses.field(default_factory=list)

    def check(self, outcome: Any, allowed: Sequence[Any], what: str) -> str:
        """Return an outcome as text; it is a problem if it is not allowed."""
        if outcome not in allowed:
            self.problems.append(f"{what}: {outcome}, not one of {', '.join(map(str, allowed))}")
        return str(outcome)


Outcomes = collections.Counter[str]
Part = Callable[[Scene], Awaitable[Outcomes]]


async def run_parts(
    url: str, process: psutil.Process, work: Work, folder: Path, parts: Sequence[str], num_files: int
) -> list[dict[str, Any]]:
    """Run parts one after the other.

    Args:
        url: The address of the server.
        process: Its process.
        work: Questions of the clients that must not notice anything.
        folder: Where the server has its temporary files.
        parts: Names of parts.
        num_files: The number of hostile files.

    Returns:
        The name, the outcomes and the problems of each part.
    """
    found = []
    async with open_client(url) as client:
        known = {number: (await send(client, work, number)).text for number in range(KNOWN)}
        for name in parts:
            scene = Scene(url, process, client, work, folder, num_files)
            found.append({"part": name} | await _run_part(scene, PARTS[name], known))
    return found


async def _run_part(
    scene: Scene, part: Callable[[Scene], Awaitable[Outcomes]], known: dict[int, str]
) -> dict[str, Any]:
    """Run a part among other clients, and compare the server before and after it."""
    before = await _measure_when_idle(scene)
    end, answered = asyncio.Event(), 0

    async def ask(number: int) -> None:
        nonlocal answered
        while not end.is_set():
            number = (number + 1) % KNOWN
            sent = await send(scene.client, scene.work, number)
            answered += 1
            if sent.error or sent.text != known[number]:
                scene.problems.append(f"another client: {sent.error or f'{sent.text!r} instead of {known[number]!r}'}")

    async def poll_health() -> None:
        while not end.is_set():
            response = await scene.client.get("/health", timeout=20)
            if response.json() != {"status": "ready"}:
                scene.problems.append(f"health: {response.text}")
            await asyncio.sleep(0.2)

    others = [asyncio.ensure_future(task) for task in (*(ask(number) for number in range(OTHERS)), poll_health())]
    try:
        outcomes = await part(scene)
    finally:
        end.set()
        results = await asyncio.gather(*others, return_exceptions=True)
    scene.problems += [f"another client: {error!r}" for error in results if isinstance(error, BaseException)]
    after = await _measure_when_idle(scene)
    growth = {name: after[name] - before[name] for name in after}
    for name in ("answers", "descriptors", "uploads"):
        if growth[name] > 0:
            scene.problems.append(f"{growth[name]:.0f} more {name} than before")
    if growth["megabytes"] > MOST_GROWTH:
        scene.problems.append(f"{growth['megabytes']:.0f} MB more than before")
    return {
        "outcomes": dict(sorted(outcomes.items())),
        "others": answered,
        "growth": {name: round(value) for name, value in growth.items()},
        "problems": scene.problems,
    }


async def _measure_when_idle(scene: Scene) -> dict[str, float]:
    """Wait until the server has nothing to do, and return what it holds."""
    deadline = asyncio.get_running_loop().time() + IDLE_SECONDS
    async with open_client(scene.url) as client:  # whose connection is the only one
        while True:
            connections = [one for one in scene.process.net_connections("tcp") if one.status == "ESTABLISHED"]
            metrics = dict(
                line.rsplit(" ", 1) for line in (await client.get("/metrics")).text.splitlines() if line[:1] != "#"
            )
            answers = sum(float(metrics[f"vllama_{name}_answers"]) for name in ("requested", "running", "waiting"))
            # The pools of threads and the decoders are never closed; connections and files are.
            held = {
                "answers": answers,
                "descriptors": scene.process.num_fds() - len(connections),
                "uploads": sum(len([*path.iterdir()]) for path in scene.folder.glob("vllama-serve-*")),
                "megabytes": scene.process.memory_info().rss / 1e6,
            }
            if not answers or asyncio.get_running_loop().time() > deadline:
                return held
            await asyncio.sleep(0.2)


async def kill_clients(scene: Scene) -> Outcomes:
    """Close connections without a goodbye: in a body, before the answer, in a stream, and in an upload."""
    host, port = _get_address(scene.url)
    rng = random.Random(0)

    async def kill(number: int) -> str:
        moment = ("in the body", "before the answer", "in the stream", "in the upload")[number % 4]
        body = json.dumps(scene.work.make_request(2000 + number)).encode()
        head = _make_head("/v1/chat/completions", len(body))
        if moment == "in the upload":
            head, body = _make_head("/v1/files", MEBIBYTE, FORM_TYPE), FORM_START + bytes(MEBIBYTE // 2)
        reader, writer = await asyncio.open_connection(host, port)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.write(head + (body[: len(body) // 2] if moment == "in the body" else body))
        await writer.drain()
        if moment == "in the stream":
            await asyncio.wait_for(reader.readuntil(b"data: "), 60)
        await asyncio.sleep(rng.uniform(0, 0.3))
        writer.transport.abort()
        return moment

    return collections.Counter(await _run_all([lambda number=number: kill(number) for number in range(KILLED)], 8))


async def upload_slowly(scene: Scene) -> Outcomes:
    """Upload files and send requests in many small parts, while silent connections are open."""

    async def drip(content: bytes) -> AsyncIterator[bytes]:
        size = len(content) // 20 + 1
        for start in range(0, len(content), size):
            yield content[start : start + size]
            await asyncio.sleep(0.1)

    async def upload(number: int) -> str:
        content = FORM_START + bytes(100_000 + number) + FORM_END
        response = await scene.client.post("/v1/files", content=drip(content), headers={"Content-Type": FORM_TYPE})
        if response.status_code != 200:
            return scene.check(response.status_code, [200], "slow upload")
        info = response.json()
        if info["bytes"] != 100_000 + number:
            scene.problems.append(f"a slow upload has {info['bytes']} bytes, not {100_000 + number}")
        deleted = await scene.client.delete(f"/v1/files/{info['id']}")
        return scene.check(deleted.status_code, [200], "removal of an upload")

    async def ask(number: int) -> str:
        body = json.dumps(scene.work.make_request(number) | {"stream": False}).encode()
        headers = {"Content-Type": "application/json"}
        response = await scene.client.post("/v1/chat/completions", content=drip(body), headers=headers)
        return scene.check(response.status_code, [200], "slow request")

    async with contextlib.AsyncExitStack() as stack:
        for _ in range(SILENT):
            _, writer = await asyncio.open_connection(*_get_address(scene.url))
            stack.callback(writer.close)
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n")
        jobs = [job for number in range(SLOW) for job in (lambda n=number: upload(n), lambda n=number: ask(n))]
        return collections.Counter(await _run_all(jobs, 2 * SLOW))


async def send_broken_bodies(scene: Scene) -> Outcomes:
    """Send what is no JSON, no request, no form or no HTTP, or unusual text. None may be an error of the server."""

    async def post(name: str, content: bytes) -> str:
        response = await _send_raw(scene.url, _make_head("/v1/chat/completions", len(content)) + content)
        return scene.check(response, [200] if name in _VALID else [400, 413, 422], name)

    async def send_raw(name: str, content: bytes) -> str:
        return scene.check(await _send_raw(scene.url, content), [400, 404, 411, 413, 415, 431, "closed"], name)

    jobs = [lambda name=name, content=content: post(name, content) for name, content in _make_bodies().items()]
    jobs += [lambda name=name, content=content: send_raw(name, content) for name, content in _make_raw().items()]
    return collections.Counter(await _run_all(jobs, 8))


_VALID = (
    "UTF-16",
    "a lone surrogate",
    "a seed of 400 digits",
    "a temperature of 1e-320",
    "a repetition penalty of 1e-320",
)


def _make_bodies() -> dict[str, bytes]:
    """Return bodies for the route of chat completions that are refused."""

    def ask(content: Any, **fields: Any) -> bytes:
        return json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()

    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    clip = base64.b64encode((CLIPS / "bell.mp4").read_bytes()).decode()
    video = [{"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{clip}"}}]
    options = [(name, 2**40) for name in ("top_k", "max_tokens", "min_tokens", "no_repeat_ngram_size", "n")]
    options += [(name, 1e300) for name in ("temperature", "repetition_penalty", "image_rate")]
    frames = [("num_frames", 2**40), ("fps", 1e300), ("max_frames", 2**40), ("start", 1e300), ("end", -1e300)]
    return {
        **{f"{name} {value}": ask("a", **{name: value}) for name, value in options},
        **{f"{name} {value}": ask(video, media_io_kwargs={"video": {name: value}}) for name, value in frames},
        "a seed of 400 digits": ask("a", seed=10**400),
        "a temperature of 1e-320": ask("a", temperature=1e-320),
        "a repetition penalty of 1e-320": ask("a", repetition_penalty=1e-320),
        "empty": b"",
        "half of an object": b'{"messages": [',
        "not UTF-8": HELLO.replace(b"Hello", b"\xff\xfe\x00"),
        "UTF-16": HELLO.decode().encode("utf-16"),
        "100,000 nested arrays": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "100,000 nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "an array": b"[]",
        "a number": b"1",
        "a huge integer": ask("a", seed=1).replace(b'"seed": 1', b'"seed": ' + b"9" * 5000),
        "an integer above 64 bits": ask("a", max_tokens=2**70),
        "not a number": ask("a", temperature=float("nan")),
        "infinity": ask("a", temperature=float("inf")),
        "a text of 1 MB": ask("a" * 1_000_000),
        "a lone surrogate": ask("\ud800"),
        "ten thousand parts": ask([image] * 10_000),
        "a URL of 1 MB": ask([{"type": "image_url", "image_url": {"url": "a" * 1_000_000}}]),
        "a null byte in a URL": ask([{"type": "video_url", "video_url": {"url": "file:///a\0b"}}]),
        "an invalid host in a URL": ask([{"type": "video_url", "video_url": {"url": "https://[::1"}}]),
    }


def _make_raw() -> dict[str, bytes]:
    """Return bytes that are not valid HTTP, or whose headers and body do not fit."""
    chat, files = "/v1/chat/completions", "/v1/files"
    upload = _make_head(files, len(FORM_START) + 4, FORM_TYPE)
    return {
        "zeros": bytes(1000),
        "a TLS handshake": bytes.fromhex("1603010200010001fc0303") + bytes(500),
        "a header of 1 MB": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * MEBIBYTE + b"\r\n\r\n",
        "a negative length": _make_head(chat, -1) + HELLO,
        "two lengths": _make_head(chat, 3).replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n") + HELLO,
        "chunks without a size": _make_head(chat, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        + b"zz\r\n",
        "an unknown encoding": _make_head(chat, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: br") + HELLO,
        "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
        "a form that ends early": upload + FORM_START + b"abcd",
        "a form without a boundary": _make_head(files, 4, "multipart/form-data") + b"abcd",
        "a form with a boundary of 60 kB": _make_head(files, 4, f"multipart/form-data; boundary={'b' * 60_000}")
        + b"abcd",
        "a form without a file": _make_head(files, len(FORM_END), FORM_TYPE) + FORM_END,
    }


async def send_hostile_files(scene: Scene) -> Outcomes:
    """Ask about mutated files of every format, as they are in tests/fuzz_media.py."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import fuzz_media

    originals = scene.folder / "originals"
    originals.mkdir()

    async def ask(made: dict[str, Any], data: bytes) -> str:
        url = f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"
        content = [{"type": "file", "file": {"file_data": url}}, {"type": "text", "text": "Describe it."}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8}
        response = await scene.client.post("/v1/chat/completions", json=body, timeout=300)
        name = f"{made['number']:03} {made['original']} {made['mutation']}"
        for hidden in ("/proc/", "/tmp/", "Traceback"):
            if hidden in response.text:
                scene.problems.append(f"{name}: the response contains {hidden}")
        return scene.check(response.status_code, [200, 415, 422], name)

    files = list(await asyncio.to_thread(lambda: list(fuzz_media.mutated(originals, 0, scene.num_files))))
    return collections.Counter(await _run_all([lambda file=file: ask(*file) for file in files], 4))


async def fill_disk(scene: Scene) -> Outcomes:
    """Upload files while the server can write no more than 1 MiB to a file, then without this limit.

    For the server, it is an `OSError` of a write, as on a full disk.
    """

    async def upload(allowed: int) -> str:
        files = {"file": ("a.mp4", bytes(3 * MEBIBYTE))}
        response = await scene.client.post("/v1/files", files=files)
        if response.status_code == 200:
            await scene.client.delete(f"/v1/files/{response.json()['id']}")
        return scene.check(response.status_code, [allowed], "upload")

    limits = resource.prlimit(scene.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(scene.process.pid, resource.RLIMIT_FSIZE, (MEBIBYTE, limits[1]))
    try:
        outcomes = await _run_all([lambda: upload(503)] * SLOW, 4)
    finally:
        resource.prlimit(scene.process.pid, resource.RLIMIT_FSIZE, limits)
    return collections.Counter([*outcomes, *await _run_all([lambda: upload(200)] * SLOW, 4)])


PARTS: dict[str, Part] = {
    "killed-clients": kill_clients,
    "slow-uploads": upload_slowly,
    "broken-bodies": send_broken_bodies,
    "hostile-files": send_hostile_files,
    "full-disk": fill_disk,
}


async def _run_all(jobs: Sequence[Callable[[], Awaitable[str]]], count: int) -> list[str]:
    """Run jobs, some at a time, and return their results."""
    places = asyncio.Semaphore(count)

    async def run(job: Callable[[], Awaitable[str]]) -> str:
        async with places:
            return await job()

    return await asyncio.gather(*map(run, jobs))


async def _send_raw(url: str, content: bytes) -> int | str:
    """Send bytes, and return the status of the response, or "closed" without one."""
    reader, writer = await asyncio.open_connection(*_get_address(url))
    try:
        writer.write(content)
        line = await asyncio.wait_for(reader.readline(), 60)
        return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else "closed"
    except ConnectionError:
        return "closed"
    except TimeoutError:
        return "no response for 60 s"
    finally:
        writer.close()


def _get_address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").rsplit(":", 1)
    return host, int(port)


def _make_head(path: str, length: int, kind: str = "application/json") -> bytes:
    """Return the head of a request whose body has this length."""
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {length}")
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()
