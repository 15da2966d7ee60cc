"""Measure `vllama serve` under load, and check that it survives clients, files and a disk that misbehave.

    python benchmarks/serve.py [--clients 1 8 32 64] [--seconds 120] [--chaos] [--json] [-- OPTIONS OF vllama serve]

The server is a process of its own, with the miniature, on a free port of 127.0.0.1. Clients ask about text, an image,
audio and videos (serve_load.py). Then the offline engine answers the requests of 32 clients, or of the largest number:
the ratio of the two rates is what the server costs. On a machine that has other users, the ratio of CPU times is more
reliable; it leaves out the clients, which share the cores with the server. The answers must be equal.

`--chaos` adds the parts of serve_chaos.py. The exit code is 1 if a request was lost or a check failed.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from serve_chaos import PARTS, run_parts
from serve_load import WARM_UP, Sent, Work, load_server, measure_memory, measure_offline, open_client, send

START_SECONDS = 600  # for the server to compile on a busy machine
COMPARED_CLIENTS = 32
COLUMNS = {
    "clients": "clients",
    "requests_per_second": "requests/s",
    "tokens_per_second": "tokens/s",
    "first_token_p50": "first token p50, s",
    "first_token_p99": "p99, s",
    "refusals": "status 429",
    "cpu_ms_per_request": "CPU, ms/request",
    "clients_cpu_ms_per_request": "of the clients",
    "server_megabytes": "server, MB",
    "decoders_megabytes": "decoders, MB",
    "offline_ratio": "rate / offline",
    "offline_cpu_ratio": "offline CPU / CPU",
}

PART_COLUMNS = {
    "part": "part",
    "outcomes": "outcomes",
    "others": "answers to others",
    "growth": "more than before",
}


@contextlib.contextmanager
def start_server(folder: Path, options: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Run `vllama serve` with temporary files in a folder. Yield its URL and its process."""
    command = [sys.executable, "-m", "vllama_jax", "serve", "--port", "0", *options]
    log = folder / "server.log"
    environment = {**os.environ, "TMPDIR": str(folder)}
    with log.open("w") as output, subprocess.Popen(command, stderr=output, env=environment) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (found := re.search(r"served at (http://\S+)", log.read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"the server has not started:\n{log.read_text()}")
                time.sleep(0.2)
            yield found[1], psutil.Process(process.pid)
        finally:
            process.terminate()
    if process.returncode:
        sys.exit(f"the server ended with exit code {process.returncode}:\n{log.read_text()}")


async def measure_load(
    url: str, process: psutil.Process, work: Work, clients: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """Load the server with each number of clients, after a few requests that compile."""
    async with open_client(url) as client:
        for number in itertools.islice(work.numbers, WARM_UP):
            if error := (await send(client, work, number)).error:
                sys.exit(f"request {number} of the warm-up failed: {error}")
    return [await load_server(url, process, work, count, seconds) for count in clients]


def compare_offline(work: Work, rows: int, level: dict[str, Any]) -> list[str]:
    """Add the ratio to the offline engine's rate, and return the problems: requests with other answers."""
    sent: list[Sent] = [one for one in level["sent"] if not one.error]
    seconds, cpu_seconds, answers = measure_offline(work, sorted(one.number for one in sent), rows)
    level["offline_ratio"] = level["requests_per_second"] * seconds / len(sent)
    level["offline_cpu_ratio"] = cpu_seconds * 1000 / len(sent) / level["cpu_ms_per_request"]
    return [
        f"request {one.number}: the server answers {one.text!r}, the offline engine {answers[one.number]!r}"
        for one in sent
        if one.text != answers[one.number]
    ]


def print_table(columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table in Markdown."""
    print("| " + " | ".join(columns.values()) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_format(row.get(name, "")) for name in columns) + " |")


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32, 64], help="none: no load")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each number of clients")
    parser.add_argument("--rows", type=int, default=8, help="answers at a time, of server and offline engine")
    parser.add_argument("--chaos", nargs="*", choices=PARTS, help="the parts of the chaos; by default all")
    parser.add_argument("--files", type=int, default=200, help="hostile files of the chaos")
    parser.add_argument("options", nargs="*", help="options of vllama serve, after --")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if any(count < 1 for count in (*arguments.clients, arguments.rows, arguments.files)) or not arguments.seconds > 0:
        parser.error("numbers must be above 0")
    return arguments


def main() -> None:
    """Run what the arguments say, and print the figures."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # it ends the server too
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="vllama-benchmark-") as name:
        folder = Path(name)
        work = Work(folder)
        options = ["--rows", str(arguments.rows), *arguments.options]
        with start_server(folder, options) as (url, process):
            start = measure_memory(process)
            levels = asyncio.run(measure_load(url, process, work, arguments.clients, arguments.seconds))
            parts = []
            if arguments.chaos is not None:
                chosen = arguments.chaos or [*PARTS]
                parts = asyncio.run(run_parts(url, process, work, folder, chosen, arguments.files))
        problems += [f"{level['clients']} clients: {error}" for level in levels for error in level["errors"]]
        problems += [f"{part['part']}: {problem}" for part in parts for problem in part["problems"]]
        if levels:
            compared = next((one for one in levels if one["clients"] == COMPARED_CLIENTS), levels[-1])
            problems += compare_offline(work, arguments.rows, compared)
    for level in levels:
        del level["sent"]
    figures = {"start": start, "levels": levels, "parts": parts, "problems": problems}
    if arguments.json:
        print(json.dumps(figures))
    else:
        if levels:
            print_table(COLUMNS, [start, *levels])
        if parts:
            print_table(PART_COLUMNS, parts)
        print("\n".join(problems[:50]) or "no problems")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
