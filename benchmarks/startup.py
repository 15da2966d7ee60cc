"""Starting a process: from the start of `vllama chat` to its answer, compared with PyTorch or with another commit.

    python benchmarks/startup.py [--rounds 3]
    python benchmarks/startup.py --commit 00139d8^

The miniature answers a question about a clip; its programs are in the compilation cache. PyTorch is a process that
imports torch and transformers, builds a model of the same size, loads its weights from safetensors, reads the clip with
PyAV and decodes as many tokens. With `--commit`, the working tree is compared with an earlier commit: CPU time of
imports, of tracing the network and of the rest, which other processes on the machine change little.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import OURS, TORCH, compare, parse_arguments, write_results

import vllama_jax as vl
from vllama_jax.checkpoints.shipped import shipped_model
from vllama_jax.config import from_json, to_json

REPOSITORY = Path(__file__).resolve().parents[1]
LINKS = {"convert": "convert", "configs": "configs", "miniature": "examples/miniature"}  # missing in older commits
CLIP = REPOSITORY / "examples/miniature/assets/clips/bell.mp4"
NEW = 16

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

TORCH_CHILD = """
import sys
from pathlib import Path
from safetensors.torch import load_model
from torch_models import TorchModel
from vllama_jax.config import from_json

config, weights, clip, length, new = sys.argv[1:]
model = TorchModel(from_json(Path(config).read_text()), int(length))
load_model(model, weights)
print(model.generate(model.embed(model.read(Path(clip))), int(new)).tolist())
"""
LENGTH = 60  # tokens of PyTorch's prompt


def list_commands(work: Path) -> dict[str, list[str]]:
    """Write the weights of the PyTorch model, and return the command of each process."""
    import torch_models
    from safetensors.torch import save_model

    config = work / "config.json"
    config.write_text(to_json(vl.load("miniature").config))
    save_model(torch_models.TorchModel(from_json(config.read_text()), LENGTH), str(work / "torch.safetensors"))
    ours = ["-m", "vllama_jax", "chat", str(CLIP), "Describe it.", "--no-audio", "--max-new-tokens", str(NEW)]
    arguments = [config, work / "torch.safetensors", CLIP, LENGTH, NEW]
    return {
        OURS: [*ours, "--model", str(shipped_model())],
        TORCH: ["-c", TORCH_CHILD, *map(str, arguments)],
    }


def compare_with_torch(options: argparse.Namespace) -> None:
    """Measure the processes in turn, and write the results."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        paths = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
        environment = {**os.environ, "PYTHONPATH": paths, "VLLAMA_CACHE": str(work / "cache")}

        def run(command: list[str]) -> None:
            subprocess.run([sys.executable, *command], env=environment, cwd=work, check=True, capture_output=True)

        commands = list_commands(work)
        rows = [
            compare(
                "start to answer, programs cached",
                functools.partial(run, commands[OURS]),
                {TORCH: functools.partial(run, commands[TORCH])},
                options.rounds,
            )
        ]
    write_results(options.out, "startup", rows)


def time_chat(checkout: Path, cache: Path, model: Path) -> dict[str, float]:
    """Ask about a clip with the package of a checkout, and return the seconds of CPU time of each phase."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(checkout), "VLLAMA_CACHE": str(cache)}
    out = cache / "times.json"
    arguments = ["chat", str(CLIP), "Describe it.", "--model", str(model)]
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


def compare_with_commit(commit: str, count: int) -> None:
    """Measure the working tree and an earlier commit in turn, and print a Markdown table."""
    with tempfile.TemporaryDirectory() as work:
        checkouts = {commit: export_commit(commit, Path(work, "before")), "current": REPOSITORY}
        results: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
        for number in range(count + 1):
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
    print(f"\nimports and tracing, current relative to {commit}: {sums['current'] / sums[commit]:.2f}")


def main() -> None:
    """Compare with PyTorch, or with a commit."""
    options = parse_arguments(__doc__, commit={"help": "compare with this commit instead"})
    if options.commit:
        compare_with_commit(options.commit, options.rounds)
    else:
        compare_with_torch(options)


if __name__ == "__main__":
    main()
