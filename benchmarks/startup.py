"""What the start of `vllama chat` costs, at two commits that take turns: imports, tracing the network, and the rest.

    python benchmarks/startup.py                     # HEAD against the commit before tracing was first halved
    python benchmarks/startup.py COMMIT --rounds 9

Prints medians in seconds of CPU time, which other processes on the machine change little, and the ratio of imports and
tracing. Programs are compiled once before, in a round that does not count. Uncommitted changes are part of "here".
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BEFORE = "00139d8^"
HERE = Path(__file__).resolve().parents[1]
LINKS = {"convert": "convert", "configs": "configs", "miniature": "examples/miniature"}  # older commits have none

CHILD = """
import builtins, importlib, json, sys, threading, time

local, lock, spent = threading.local(), threading.Lock(), {"imports": 0.0, "tracing": 0.0}

def timed(name, function):
    def call(*args, **kwargs):
        if getattr(local, "inside", False):  # an import within an import
            return function(*args, **kwargs)
        local.inside, start = True, time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            local.inside = False
            with lock:
                spent[name] += time.thread_time() - start
    return call

builtins.__import__ = timed("imports", builtins.__import__)
importlib.import_module = timed("imports", importlib.import_module)
from flax import nnx
nnx.eval_shape = timed("tracing", nnx.eval_shape)
from vllama_jax.cli import main
main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump({**spent, "all": time.process_time()}, file)
"""


def chat(checkout: Path, cache: Path, model: Path) -> dict[str, float]:
    """Ask about a clip with the package of a checkout and return seconds of CPU time by phase."""
    clip = HERE / "examples/miniature/assets/clips/bell.mp4"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(checkout), "VLLAMA_CACHE": str(cache)}
    out = cache / "times.json"
    arguments = ["chat", str(clip), "Describe it.", "--model", str(model)]
    command = [sys.executable, "-c", CHILD, str(out), *arguments]
    subprocess.run(command, env=environment, cwd=cache, check=True, capture_output=True)
    times = json.loads(out.read_text())
    return {**times, "rest": times["all"] - times["imports"] - times["tracing"]}


def checked_out(commit: str, folder: Path) -> Path:
    """Export a commit's files into a folder."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=HERE, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "x"], cwd=folder, input=archive, check=True)
    for name, target in LINKS.items():
        if not (folder / "vllama_jax" / name).exists():
            (folder / "vllama_jax" / name).symlink_to(folder / target)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default=BEFORE)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    from vllama_jax.checkpoints.shipped import shipped_model

    with tempfile.TemporaryDirectory() as work:
        checkouts = {given.commit: checked_out(given.commit, Path(work, "before")), "here": HERE}
        found = {name: [] for name in checkouts}
        for number in range(given.rounds + 1):
            for name, checkout in checkouts.items():
                cache = Path(work, f"cache of {name}".replace("/", "_"))
                cache.mkdir(exist_ok=True)
                times = chat(checkout, cache, shipped_model())
                found[name] += [times] if number else []
    print("| seconds of CPU time | imports | tracing | both | rest |\n|---|---|---|---|---|")
    sums = {}
    for name, rounds in found.items():
        sums[name] = statistics.median(times["imports"] + times["tracing"] for times in rounds)
        imports, tracing, rest = (
            statistics.median(times[phase] for times in rounds) for phase in ("imports", "tracing", "rest")
        )
        print(f"| {name} | {imports:.2f} | {tracing:.2f} | {sums[name]:.2f} | {rest:.2f} |")
    print(f"\nimports and tracing, here over {given.commit}: {sums['here'] / sums[given.commit]:.2f}")


if __name__ == "__main__":
    main()
