"""Measure loading and decoding in int8 and int4, relative to float32 and bfloat16.

    python benchmarks/quantized.py [--json]

Writes a model with random weights and loads it in each variant, in its own process to measure peak memory. LLaMA has
heads of full width and 8 layers of width 2048, the ViT 4 layers of full width: 2.2 GB in float32, which two cores can
process. Times of a decoded token are relative to float32's. A lower bound of each is the bytes of the language model
divided by the memory bandwidth.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from language import measure_token_seconds
from sizes import LLAMA
from timing import print_figures

import vllama_jax as vl
from vllama_jax.config import EVA_G, tiny
from vllama_jax.convert.tiny import write_tiny

VARIANTS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}
REPEATS = 3


def write_model(folder: Path) -> Path:
    """Write a model directory with random weights."""
    cfg = dataclasses.replace(tiny(), llama=LLAMA, vit=dataclasses.replace(EVA_G, depth=4))
    files = write_tiny(folder / "files", config=cfg)
    components = {name: path for name, path in files.items() if name not in ("llama", "config")}
    config = json.loads(files["config"].read_text())
    vl.convert.convert(
        vl.convert.plan(llama_directory=files["llama"], files=components, config=config), folder / "model"
    )
    return folder / "model"


def measure(model: str, variant: str) -> dict[str, float]:
    """Load a variant of the model in this process, and measure time, peak memory and decoding."""
    jax.devices()
    before, start = read_memory_mb("VmRSS"), time.perf_counter()
    llama = vl.load(model, **VARIANTS[variant]).network.llama
    jax.block_until_ready(jax.tree.leaves(llama))
    load_seconds = time.perf_counter() - start
    peak = read_memory_mb("VmHWM") - before  # ru_maxrss would include the parent's memory
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(llama)) - llama.embedding.nbytes  # one row of that is read
    seconds = min(measure_token_seconds(llama) for _ in range(REPEATS))
    return {"load_seconds": load_seconds, "peak_mb": peak, "decode_mb": size / 1e6, "token_ms": seconds * 1e3}


def read_memory_mb(name: str) -> float:
    """Read a memory figure of this process in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1e3


def main() -> None:
    """Measure all variants in subprocesses and print their figures."""
    if "--measure" in sys.argv:
        print(json.dumps(measure(*sys.argv[-2:])))
        return
    figures = {"device": jax.devices()[0].device_kind}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--measure", str(model), variant]
            results = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            figures |= {f"{variant}_{name}": value for name, value in results.items()}
            figures[f"{variant}_token_over_float32"] = figures[f"{variant}_token_ms"] / figures["float32_token_ms"]
    print_figures(figures)


if __name__ == "__main__":
    main()
