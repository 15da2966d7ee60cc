"""The work of benchmarks/serve.py, its clients, and the same work on the offline engine (`vllama_jax.answering`)."""

import asyncio
import base64
import dataclasses
import itertools
import json
import statistics
import time
import wave
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from vllama_jax.checkpoints.shipped import CLIPS
from vllama_jax.media import FrameSampling, read_media

MAX_NEW_TOKENS = 48
MAX_REFUSALS = 100  # of a request, with status 429
WARM_UP = 24  # requests that compile what the work needs: three of each kind
QUESTIONS = ("Describe it.", "Which way does it go?", "What do you hear?")
TEXTS = ("What is a bell?", "Hello?", "Which animals do you know?")
_PART_TYPES = {".mp4": "video_url", ".jpg": "image_url", ".wav": "audio_url"}


@dataclasses.dataclass(frozen=True)
class Task:
    """A question about a file.

    Attributes:
        question: The question.
        file: The file; None for a question without media.
        start: Where the window of a video starts, in seconds. A window that was not read before is decoded and encoded.
    """

    question: str
    file: Path | None = None
    start: float | None = None


class Work:
    """An endless, reproducible list of questions.

    A quarter has only text, an eighth each is about an image and about audio, a quarter about two videos, and a quarter
    about windows of a video that no other question is about.

    Args:
        folder: A folder for the audio file.

    Attributes:
        numbers: The numbers of the questions that were not sent yet.
    """

    def __init__(self, folder: Path):
        self.numbers = itertools.count()
        self._audio = folder / "bell.wav"
        found = read_media(CLIPS / "bell.mp4")
        with wave.open(str(self._audio), "wb") as file:
            file.setnchannels(len(found.waveform))
            file.setsampwidth(2)
            file.setframerate(found.sample_rate)
            file.writeframes((np.clip(found.waveform.T, -1, 1) * 32767).astype("<i2").tobytes())

    def get_task(self, number: int) -> Task:
        """Return the question of a number."""
        question = QUESTIONS[number % 3]
        image, video, other = CLIPS / "birds.jpg", CLIPS / "bell.mp4", CLIPS / "two.mp4"
        files = (None, image, video, "window", None, self._audio, other, "window")
        chosen = files[number % len(files)]
        if chosen is None:
            return Task(TEXTS[number % 3])
        if isinstance(chosen, str):
            return Task(question, video, number // 4 % 2000 / 1000)  # every millisecond once
        return Task(question, chosen)

    def make_request(self, number: int) -> dict[str, Any]:
        """Return the body of a request, with its file in base64."""
        task = self.get_task(number)
        content: list[dict[str, Any]] = [{"type": "text", "text": task.question}]
        fields: dict[str, Any] = {}
        if task.file is not None:
            kind = _PART_TYPES[task.file.suffix]
            data = base64.b64encode(task.file.read_bytes()).decode()
            content.insert(0, {"type": kind, kind: {"url": f"data:application/octet-stream;base64,{data}"}})
        if task.start is not None:
            fields["media_io_kwargs"] = {"video": {"start": task.start}}
        message = {"role": "user", "content": content}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {"messages": [message], "max_tokens": MAX_NEW_TOKENS, **stream, **fields}


@dataclasses.dataclass(kw_only=True)
class Sent:
    """What became of a request.

    Attributes:
        number: Its number in the work.
        first_seconds: Until its first text, without the waits after refusals; None without text.
        tokens: The number of its tokens.
        text: The answer.
        refusals: How many times the server had no room (status 429).
        error: Why there is no answer; empty if there is one.
    """

    number: int
    first_seconds: float | None = None
    tokens: int = 0
    text: str = ""
    refusals: int = 0
    error: str = ""


async def send(client: httpx.AsyncClient, work: Work, number: int) -> Sent:
    """Send a request until the server has room for it, and return its answer."""
    sent = Sent(number=number)
    body = json.dumps(work.make_request(number)).encode()
    while sent.refusals < MAX_REFUSALS:
        wait = await _send_once(client, body, sent)
        if wait is None:
            return sent
        sent.refusals += 1
        await asyncio.sleep(wait)
    sent.error = f"refused {MAX_REFUSALS} times"
    return sent


async def _send_once(client: httpx.AsyncClient, body: bytes, sent: Sent) -> float | None:
    """Send a request once. Return after how many seconds to try again; None if it was not refused."""
    start = time.monotonic()
    is_done = False
    headers = {"Content-Type": "application/json"}
    try:
        async with client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
            if response.status_code == 429:
                return float(response.headers["Retry-After"])
            if response.status_code != 200:
                sent.error = f"status {response.status_code}: {(await response.aread()).decode()[:300]}"
                return None
            async for line in response.aiter_lines():
                is_done = is_done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    _read_event(json.loads(line[6:]), sent, time.monotonic() - start)
    except httpx.HTTPError as error:
        sent.error = f"{type(error).__name__}: {error}"
    if not is_done and not sent.error:
        sent.error = "the stream ended early"
    return None


def _read_event(event: dict[str, Any], sent: Sent, seconds: float) -> None:
    if "error" in event:
        sent.error = event["error"]["message"]
        return
    for choice in event["choices"]:
        if text := choice["delta"].get("content"):
            sent.text += text
            sent.first_seconds = sent.first_seconds or seconds
    if event.get("usage"):
        sent.tokens = event["usage"]["completion_tokens"]


async def load_server(url: str, process: psutil.Process, work: Work, clients: int, seconds: float) -> dict[str, Any]:
    """Send requests with several clients, each of which sends the next one when it has its answer.

    Args:
        url: The address of the server.
        process: Its process.
        work: The work.
        clients: The number of clients.
        seconds: For how long they send requests.

    Returns:
        The figures, and "sent", which has what became of each request.
    """
    found: list[Sent] = []
    start = time.monotonic()
    deadline = start + seconds

    async def run(client: httpx.AsyncClient) -> None:
        while time.monotonic() < deadline:
            found.append(await send(client, work, next(work.numbers)))

    before, own_before = measure_cpu_seconds(process), time.process_time()
    async with open_client(url) as client:
        await asyncio.gather(*(run(client) for _ in range(clients)))
    elapsed = time.monotonic() - start
    cpu_seconds, own_seconds = measure_cpu_seconds(process) - before, time.process_time() - own_before
    first = sorted(one.first_seconds for one in found if one.first_seconds is not None)
    answered = [one for one in found if not one.error]
    return {
        "clients": clients,
        "seconds": elapsed,
        "requests": len(answered),
        "requests_per_second": len(answered) / elapsed,
        "tokens_per_second": sum(one.tokens for one in answered) / elapsed,
        "first_token_p50": _find_quantile(first, 50),
        "first_token_p99": _find_quantile(first, 99),
        "refusals": sum(one.refusals for one in found),
        "errors": [one.error for one in found if one.error],
        "cpu_ms_per_request": 1000 * cpu_seconds / max(len(answered), 1),
        "clients_cpu_ms_per_request": 1000 * own_seconds / max(len(answered), 1),
        **measure_memory(process),
        "sent": found,
    }


def open_client(url: str) -> httpx.AsyncClient:
    """Return a client without a limit of connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False)


def measure_cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a server and of its decoders so far."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def measure_memory(process: psutil.Process) -> dict[str, float]:
    """Return the resident memory of a server and of its decoders, in MB."""
    decoders = 0
    for child in process.children(recursive=True):
        try:
            decoders += child.memory_info().rss
        except psutil.NoSuchProcess:  # it has ended since
            continue
    return {"server_megabytes": process.memory_info().rss / 1e6, "decoders_megabytes": decoders / 1e6}


def measure_offline(work: Work, numbers: Sequence[int], rows: int) -> tuple[float, float, dict[int, str]]:
    """Answer requests with the offline engine, after a few that compile.

    Args:
        work: The work.
        numbers: The numbers of the requests.
        rows: The number of answers that are decoded at a time.

    Returns:
        The time and the CPU time in seconds, and the answers by number.
    """
    from vllama_jax.answering import AnsweringOptions, FileQuestion, answer_questions
    from vllama_jax.config import GREEDY
    from vllama_jax.media_tokens import PreparedMedia, prepare_media
    from vllama_jax.model import load

    model = load("miniature")
    config = dataclasses.replace(GREEDY, max_new_tokens=MAX_NEW_TOKENS)

    def read(file: Hashable) -> PreparedMedia:
        assert isinstance(file, tuple)
        return prepare_media(file[0], model.config, sampling=FrameSampling(start=file[1] or 0.0))

    def ask(number: int) -> FileQuestion:
        task = work.get_task(number)
        files = () if task.file is None else ((task.file, task.start),)
        return FileQuestion(key=number, files=files, text=task.question, config=config)

    def answer(questions: Sequence[FileQuestion]) -> dict[int, str]:
        found = answer_questions(lambda: [model], questions, read, AnsweringOptions(rows=rows))
        return {one.question.key: one.error or one.answers[0] for one in found}

    answer([ask(number) for number in range(WARM_UP)])
    questions = [ask(number) for number in numbers]
    start, cpu_start = time.monotonic(), time.process_time()
    answers = answer(questions)
    return time.monotonic() - start, time.process_time() - cpu_start, answers


def _find_quantile(values: Sequence[float], percent: int) -> float:
    """Return a percentile of sorted values, in the unit of the values; NaN without values."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
