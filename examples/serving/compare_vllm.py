"""Compare the answers of a vLLM server with those of the model's own engine.

    pip install vllm                                 # in an environment of its own, whose `vllm` is in PATH
    python examples/serving/compare_vllm.py          # the miniature; exports it and starts `vllm serve`
    python examples/serving/compare_vllm.py MODEL --engine http://host:8000 --dtype bfloat16

Asks the same questions about the miniature's clips of `vllama serve` with and without --engine, and prints how many
answers are equal. In float32, all should be; in bfloat16, some differ where two tokens are almost equally probable.
"""

import argparse
import base64
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

CLIPS = Path(__file__).resolve().parents[1] / "miniature/assets/clips"
QUESTIONS = ("Describe it.", "Which way does it go?", "What do you hear?", "Does the sound fit the picture?")
VLLAMA = (sys.executable, "-m", "vllama_jax")
START_SECONDS = 900.0  # for vLLM to load and compile


def ask_all(url: str) -> list[str]:
    """Ask all questions about all clips, in conversations of two turns, and return the answers."""
    answers = []
    for clip in sorted(CLIPS.glob("*.mp4")):
        data = base64.b64encode(clip.read_bytes()).decode()
        video = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
        for first, second in zip(QUESTIONS, QUESTIONS[1:] + QUESTIONS[:1], strict=True):
            messages: list[dict] = []
            for content in ([video, {"type": "text", "text": first}], second):
                messages.append({"role": "user", "content": content})
                body = {"messages": messages, "max_tokens": 64}
                response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
                if response.status_code != 200:
                    sys.exit(f"{url}: {response.text}")
                answers.append(response.json()["choices"][0]["message"]["content"])
                messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@contextlib.contextmanager
def run_vllama(model: str, dtype: str, *options: str) -> Iterator[str]:
    """Run `vllama serve` until the context ends. Yields its URL."""
    command = [*VLLAMA, "serve", model, "--port", "0", "--dtype", dtype, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"is served at (http://\S+)", line):
                    yield found[1]
                    return
            sys.exit("".join(lines))
        finally:
            process.terminate()


@contextlib.contextmanager
def run_vllm(model: str, dtype: str) -> Iterator[str]:
    """Export a model and run `vllm serve` on its language model until the context ends. Yields its URL."""
    if shutil.which("vllm") is None:
        sys.exit(
            "vllm is not installed: `pip install vllm` in an environment of its own and add its bin directory to PATH, "
            "or pass the URL of a running server with --engine"
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder, "exported")
        subprocess.run([*VLLAMA, "export", model, "--out", str(exported)], check=True)
        options = ["--enable-prompt-embeds", "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with subprocess.Popen(["vllm", "serve", str(exported / "llama"), *options], env=environment) as process:
            try:
                wait_until_ready(process, f"http://127.0.0.1:{port}")
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()


def wait_until_ready(process: subprocess.Popen, url: str) -> None:
    """Wait until vLLM answers. Exits if it ends, or takes longer than START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"vllm serve ended with code {process.returncode}; its messages are above")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(1)
    sys.exit(f"vllm serve was not ready after {START_SECONDS:g} s")


def main() -> None:
    """Ask both, and print the answers that differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="miniature", help="a model or run directory")
    parser.add_argument("--engine", help="the URL of a running vLLM server with the exported language model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    vllm = contextlib.nullcontext(arguments.engine) if arguments.engine else run_vllm(arguments.model, arguments.dtype)
    with vllm as engine, run_vllama(arguments.model, arguments.dtype, "--engine", engine) as url:
        found = ask_all(url)
    with run_vllama(arguments.model, arguments.dtype) as url:
        expected = ask_all(url)
    different = [pair for pair in zip(found, expected, strict=True) if len(set(pair)) > 1]
    for one, other in different:
        print(f"vLLM: {one!r}\nown engine: {other!r}\n")
    print(f"{len(found) - len(different)} of {len(found)} answers are equal")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
