"""Memory and expected speed of the presets, compiled ahead of time: the tables and plots of docs/scaling.md.

    pip install '.[aot]'
    JAX_PLATFORMS=cpu python benchmarks/scaling.py compile   # the programs that docs/scaling/programs.json lacks
    python benchmarks/scaling.py tables                      # the tables and plots, from that file

No TPU is needed. `compile` takes one to five minutes and 4 GB of memory for each program. Remove a program's object
from the file to compile it again.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure

from vllama_jax.config import video_llama_7b, video_llama_13b
from vllama_jax.memory.abstract_run import abstract_run
from vllama_jax.memory.flops import step_flops_by_component
from vllama_jax.train.config_files import load_config
from vllama_jax.train.presets import PRESETS

FOLDER = Path(__file__).parents[1] / "docs" / "scaling"
PROGRAMS = FOLDER / "programs.json"
SIZES = {"7b": video_llama_7b, "13b": video_llama_13b}
TOKENS = {"vision_stage1": 72, "vision_stage2": 512, "audio_stage1": 48, "audio_stage2": 640}  # the longest of each
SPARE = 0.05  # of a chip's memory
AUDIO_PRESET = "v5e-256"  # the one for which the stages of the audio branch are compiled


def list_programs() -> Iterator[tuple[str, str, str]]:
    """Yield (config, preset, size) of every program of the table."""
    for config in TOKENS:
        for preset in PRESETS if config.startswith("vision") else [AUDIO_PRESET]:
            yield from ((config, preset, size) for size in SIZES)


def name_program(config: str, preset: str, size: str) -> str:
    """Return the key of a program in the file."""
    return f"{config}@{preset} {size}"


def compile_programs() -> None:
    """Compile the programs that the file lacks; it is written after each."""
    found = read_programs()
    for config, preset, size in list_programs():
        name = name_program(config, preset, size)
        if name in found:
            continue
        command = [sys.executable, "-m", "vllama_jax", "compile", f"{config}@{preset}", "--model", size]
        command += ["--length", str(TOKENS[config]), "--json"]
        found[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)[0]
        PROGRAMS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {found[name]['step_ms']:.0f} ms, compiled in {found[name]['compile_seconds'] or 0:.0f} s")


def read_programs() -> dict[str, dict[str, Any]]:
    """Read the reports of all compiled programs, as `vllama compile --json` prints them."""
    return json.loads(PROGRAMS.read_text()) if PROGRAMS.exists() else {}


def print_presets(found: dict[str, dict[str, Any]]) -> None:
    """Print a row for each program that was compiled: mesh, memory, expected time and what binds."""
    print(
        "| program | mesh (data, fsdp, tensor) | rows a chip, tokens | GB of a chip | TFLOP of a chip | ms compute |",
        end="",
    )
    print(" ms network | ms expected | MFU | samples/s a chip | binds | s to compile |")
    print("|---" * 12 + "|")
    for name in (name_program(*program) for program in list_programs()):
        if name not in found:
            continue
        one = found[name]
        used, limit = one["hbm_bytes_per_chip"] / 1e9, one["hbm_limit_bytes"] / 1e9
        chips = one["mesh"]["data"] * one["mesh"]["fsdp"] * one["mesh"]["tensor"]
        columns = (
            name,
            ", ".join(map(str, one["mesh"].values())),
            f"{one['rows']}, {one['tokens']}",
            f"{used:.1f} of {limit:.1f}" + ("" if used < (1 - SPARE) * limit else ", **too much**"),
            f"{one['flops_per_chip'] / 1e12:.0f}",
            f"{one['compute_ms']:.0f}",
            f"{one['network_ms']:.0f}",
            f"{one['step_ms']:.0f}" if one["compiled"] else f"at least {one['step_ms']:.0f}",
            f"{one['mfu']:.0%}" if one["mfu"] else "–",
            f"{'' if one['compiled'] else 'at most '}{one['samples_per_second'] / chips:.1f}",
            one["binds"],
            f"{one['compile_seconds']:.0f}" if one["compiled"] else "–",
        )
        print(f"| {' | '.join(columns)} |")


@functools.cache
def count_flops_and_bytes(config: str, size: str) -> tuple[dict[str, float], dict[str, float]]:
    """Count the work of a sample, at the longest padded length of a run, and the memory of its weights.

    Returns:
        FLOPs by component. Bytes of the frozen weights by component, in bfloat16, and of the trained state.
    """
    model, run = SIZES[size](), dataclasses.replace(load_config(config)[0], batch_size=1, compute_dtype="bfloat16")
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    abstract = abstract_run(model, run, mesh, TOKENS[config])
    sizes = {"llama": 0.0, "encoders": 0.0}
    for path, leaf in abstract.frozen.items():
        sizes["llama" if path.startswith("llama/") else "encoders"] += leaf.size * leaf.dtype.itemsize
    sizes["trained"] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract.state))
    return step_flops_by_component(model, run.branch, abstract.batch, run.remat_policy), sizes


def print_arithmetic() -> None:
    """Print the FLOPs of a sample by component, what caching features saves, and the bytes of weights."""
    print("| run | tokens | TFLOP: encoders | trained Q-Former | LLaMA | all | with cached features |", end="")
    print(" GB frozen: encoders | LLaMA | GB trained, with Adam |")
    print("|---" * 10 + "|")
    for config, tokens in TOKENS.items():
        for size in SIZES:
            flops, sizes = count_flops_and_bytes(config, size)
            total = sum(flops.values())
            cached = f"{(total - flops['encoders']) / 1e12:.1f} (-{flops['encoders'] / total:.0%})"
            parts = [f"{flops[name] / 1e12:.2f}" for name in ("encoders", "qformer", "llama")]
            weights = [f"{sizes[name] / 1e9:.1f}" for name in ("encoders", "llama", "trained")]
            columns = (f"{config}, {size}", str(tokens), *parts, f"{total / 1e12:.1f}", cached, *weights)
            print(f"| {' | '.join(columns)} |")


def plot_flops() -> None:
    """Plot the FLOPs of a sample by component."""
    figure = matplotlib.figure.Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    labels = [f"{config}\n{size}" for config in TOKENS for size in SIZES]
    below = [0.0] * len(labels)
    for component in ("encoders", "qformer", "llama"):
        heights = [count_flops_and_bytes(config, size)[0][component] / 1e12 for config in TOKENS for size in SIZES]
        axes.bar(labels, heights, bottom=below, label=component)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set(ylabel="TFLOP of a sample", title="Work of a training step, by component")
    axes.tick_params(axis="x", labelrotation=30, labelsize=8)
    axes.legend()
    figure.savefig(FOLDER / "flops.png", dpi=100)


def plot_times(found: dict[str, dict[str, Any]]) -> None:
    """Plot compute, network and expected time of each preset, a panel for each stage of the vision branch and size."""
    figure = matplotlib.figure.Figure(figsize=(10, 7), layout="constrained")
    for axes, (config, size) in zip(
        figure.subplots(2, 2).flat, [(config, size) for config in list(TOKENS)[:2] for size in SIZES], strict=True
    ):
        names = [preset for preset in PRESETS if name_program(config, preset, size) in found]
        reports = [found[name_program(config, preset, size)] for preset in names]
        for shift, field, label in (
            (-0.25, "compute_ms", "compute"),
            (0, "network_ms", "network"),
            (0.25, "step_ms", "expected"),
        ):
            places = [place + shift for place in range(len(names))]
            axes.bar(places, [report[field] for report in reports], 0.25, label=label)
        axes.set_xticks(range(len(names)), names, rotation=30, fontsize=8)
        axes.set(title=f"{config}, {size}", ylabel="ms of a step")
    figure.axes[0].legend()
    figure.savefig(FOLDER / "times.png", dpi=100)


def main(command: str = "tables") -> None:
    """Run one of the two commands."""
    if command == "compile":
        compile_programs()
        return
    found = read_programs()
    print_arithmetic()
    print()
    print_presets(found)
    plot_flops()
    plot_times(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
