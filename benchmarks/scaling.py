"""Memory and expected speed of the presets, compiled ahead of time: the tables and plots of docs/scaling.md.

    pip install '.[aot,plot]'
    JAX_PLATFORMS=cpu python benchmarks/scaling.py compile   # the programs that docs/scaling/programs.json lacks
    python benchmarks/scaling.py tables                      # the tables and plots, from that file

No TPU is needed. `compile` takes about two minutes and 4 GB of memory for each program. Remove a program's object from
the file to compile it again.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllama_jax.config import video_llama_7b, video_llama_13b
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
    return json.loads(PROGRAMS.read_text()) if PROGRAMS.exists() else {}
