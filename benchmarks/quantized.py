"""Loading and decoding in 8 and 4 bits beside float32 and bfloat16, as ratios within one run.

    python benchmarks/quantized.py [--json]

A model of random weights is written and loaded, each way in a process of its own, for its peak of memory. LLaMA has
full-width heads and 8 layers of width 2048, the ViT 4 layers of its full width: 2.2 GB in float32, so that two cores
can do it. A decoded token's floor is the language model's bytes over bandwidth; float32's time is the unit here.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from inference import LLAMA, show, token_seconds

import vllama_jax as vl
from vllama_jax.config import EVA_G, tiny
from vllama_jax.convert.tiny import write_tiny

WAYS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}
REPEATS = 3


def write_model(folder: Path) -> Path:
    cfg = dataclasses.replace(tiny(), llama=LLAMA, vit=dataclasses.replace(EVA_G, depth=4))
    files = write_tiny(folder / "files", config=cfg)
    pieces = {kind: path for kind, path in files.items() if kind not in ("llama", "config")}
    config = json.loads(files["config"].read_text())
    vl.convert.convert(vl.convert.plan(llama_directory=files["llama"], files=pieces, config=config), folder / "model")
    return folder / "model"


def measure(model: str, way: str) -> dict[str, float]:
    jax.devices()
    before, start = memory("VmRSS"), time.perf_counter()
    llama = vl.load(model, **WAYS[way]).network.llama
    jax.block_until_ready(jax.tree.leaves(llama))
    loaded = time.perf_counter() - start
    peak = memory("VmHWM") - before  # ru_maxrss would begin at the parent's
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(llama)) - llama.embedding.nbytes  # one row of that is read
    seconds = min(token_seconds(llama) for _ in range(REPEATS))
    return {"load_seconds": loaded, "peak_mb": peak, "decode_mb": size / 1e6, "token_ms": seconds * 1e3}


def memory(name: str) -> float:
    """Of this process, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1e3


def main() -> None:
    if "--measure" in sys.argv:
        print(json.dumps(measure(*sys.argv[-2:])))
        return
    figures = {"device": jax.devices()[0].device_kind}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        for way in WAYS:
            command = [sys.executable, __file__, "--measure", str(model), way]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            figures |= {f"{way}_{name}": value for name, value in found.items()}
            figures[f"{way}_token_over_float32"] = figures[f"{way}_token_ms"] / figures["float32_token_ms"]
    show(figures)


if __name__ == "__main__":
    main()
