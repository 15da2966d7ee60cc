"""Measure the CPU time of starting `vllama chat` at two commits: imports, tracing the network, and the rest.

    python benchmarks/startup.py                     # the working tree against the commit before tracing was halved
    python benchmarks/startup.py COMMIT --rounds 9

The commits alternate. Prints medians of the CPU time, which other processes on the machine change little, and the ratio
of imports and tracing. A first round, which does not count, compiles the programs. "current" includes uncommitted
changes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

DEFAULT_COMMIT = "00139d8^"
REPOSITORY = Path(__file__).resolve().parents[1]
LINKS = {"convert": "convert", "configs": "configs", "miniature": "examples/miniature"}  # missing in older commits

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


def time_chat(checkout: Path, cache: Path, model: Path) -> dict[str, float]:
    """Ask about a clip with the package of a checkout, and return the seconds of CPU time of each phase."""
    clip = REPOSITORY / "examples/miniature/assets/clips/bell.mp4"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(checkout), "VLLAMA_CACHE": str(cache)}
    out = cache / "times.json"
    arguments = ["chat", str(clip), "Describe it.", "--model", str(model)]
    command = [sys.executable, "-c", CHILD, str(out), *arguments]
    subprocess.run(command, env=environment, cwd=cache, check=True, capture_output=True)
    times = json.loads(out.read_text())
    return {**times, "rest": times["all"] - times["imports"] - times["tracing"]}


def export_commit(commit: str, folder: Path) -> Path:
    """Export the files of a commit into a folder."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "x"], cwd=folder, input=archive, check=True)
    for name, target in LINKS.items():
        if not (folder / "vllama_jax" / name).exists():
            (folder / "vllama_jax" / name).symlink_to(folder / target)
    return folder


def main() -> None:
    """Measure both commits and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default=DEFAULT_COMMIT)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    from vllama_jax.checkpoints.shipped import shipped_model

    with tempfile.TemporaryDirectory() as work:
        checkouts = {options.commit: export_commit(options.commit, Path(work, "before")), "current": REPOSITORY}
        results = {name: [] for name in checkouts}
        for number in range(options.rounds + 1):
            for name, checkout in checkouts.items():
                cache = Path(work, f"cache of {name}".replace("/", "_"))
                cache.mkdir(exist_ok=True)
                times = time_chat(checkout, cache, shipped_model())
                results[name] += [times] if number else []
    print("| seconds of CPU time | imports | tracing | both | rest |\n|---|---|---|---|---|")
    sums = {}
    for name, rounds in results.items():
        sums[name] = statistics.median(times["imports"] + times["tracing"] for times in rounds)
        imports, tracing, rest = (
            statistics.median(times[phase] for times in rounds) for phase in ("imports", "tracing", "rest")
        )
        print(f"| {name} | {imports:.2f} | {tracing:.2f} | {sums[name]:.2f} | {rest:.2f} |")
    print(f"\nimports and tracing, current relative to {options.commit}: {sums['current'] / sums[options.commit]:.2f}")


if __name__ == "__main__":
    main()
