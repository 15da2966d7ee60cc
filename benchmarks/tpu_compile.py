"""Compile the training step of the vision branch for a TPU slice, and print its memory and all-reduces per chip.

    pip install libtpu
    python benchmarks/tpu_compile.py [MODEL] [TOPOLOGY] [DATA,FSDP,TENSOR] [EXAMPLES PER CHIP] [TOKENS]
    python benchmarks/tpu_compile.py 7b v5e:4x4 1,16,1 4 128

Compilation is ahead of time: libtpu compiles for a named topology, needs no TPU, and runs nothing. The step is that of
`vllama train` with all components of the vision branch at full size: bfloat16, remat policy full, AdamW, donated state.
An all-reduce counts as twice the bytes of its result, and once for each iteration of a loop over layers. Without
sharding constraints on activations, the compiler multiplies with shards of weights and sums the products, which is
hundreds of GB.
"""

import math
import re
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from vllama_jax import config, sharding
from vllama_jax.nn.network import abstract_network
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.config_files import load_config
from vllama_jax.train.loop import make_train_step
from vllama_jax.train.optim import make_optimizer
from vllama_jax.train.setup import RunPlan
from vllama_jax.train.state import AbstractModel, select_paths

BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "u8": 1, "pred": 1}
MODELS = {"7b": config.LLAMA_7B, "13b": config.LLAMA_13B}
ALL_REDUCE = re.compile(r"= (\(?[^=]*?) all-reduce(?:-start)?\(.*channel_id=(\d+)")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def make_plan(model: config.VideoLlamaConfig, run: TrainConfig, mesh: jax.sharding.Mesh) -> RunPlan:
    """Make the plan of a run whose base model has shapes only."""
    abstract_model = AbstractModel(abstract_network(model, run.compute_dtype))
    trainable_paths = tuple(select_paths(list(abstract_model.variables), run.trainable))
    optimizer = make_optimizer(run.optim, run.steps)
    return RunPlan(run, None, mesh, abstract_model, trainable_paths, dict.fromkeys(trainable_paths), optimizer, None)


def make_abstract_inputs(plan: RunPlan, rows: int, tokens: int, model: config.VideoLlamaConfig) -> tuple:
    """Return the shapes and shardings of the step's inputs: train state, frozen parameters and batch."""
    abstract_model = plan.abstract_model
    frozen_paths = abstract_model.variables.keys() - set(plan.trainable_paths)
    shardings = abstract_model.shardings(frozen_paths, plan.mesh)
    frozen = {
        path: jax.ShapeDtypeStruct(abstract_model.variables[path].shape, plan.dtype, sharding=path_sharding)
        for path, path_sharding in shardings.items()
    }
    size, labels = model.vit.image_size, tokens // 2
    shapes = {
        "frames": ((model.num_frames, size, size, 3), jnp.uint8),
        "ids": ((tokens,), jnp.int32),
        "is_media": ((tokens,), jnp.bool_),
        "length": ((), jnp.int32),
        "positions": ((labels,), jnp.int32),
        "targets": ((labels,), jnp.int32),
    }
    batch = {
        name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=plan.batch_sharding)
        for name, (shape, dtype) in shapes.items()
    }
    return plan.abstract_state, frozen, batch


def split_computations(text: str) -> dict[str, str]:
    """Split an HLO module into the bodies of its computations, by name."""
    return {
        found[1]: found[2] for found in re.finditer(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    }


def sum_all_reduces(text: str) -> float:
    """Return the bytes of all all-reduces in a step."""
    bodies, counted = split_computations(text), set()

    def visit(name: str, iterations: int) -> float:
        total, body = 0.0, bodies[name]
        for result, channel in ALL_REDUCE.findall(body):
            sizes = [BYTES[t] * math.prod(map(int, filter(None, d.split(",")))) for t, d in ARRAY.findall(result)]
            total += 0 if channel in counted else 2 * iterations * sum(sizes)
            counted.add(channel)
        for condition, inner in re.findall(r"while\(.*?condition=%?([\w.-]+), body=%?([\w.-]+)", body):
            limits = map(int, re.findall(r"constant\((\d+)\)", bodies[condition]))
            total += visit(inner, iterations * max(limits, default=1))
        called = re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", body)
        return total + sum(visit(inner, iterations) for inner in called if inner in bodies)

    return visit(re.search(r"^ENTRY %?([\w.-]+)", text, re.M)[1], 1)


def main(name: str = "7b", slice: str = "v5e:4x4", axes: str = "1,16,1", rows: str = "4", tokens: str = "128") -> None:
    """Compile the step and print its figures for one chip."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=slice)
    mesh = sharding.make_mesh(*map(int, axes.split(",")), devices=topology.devices)
    model = config.video_llama(MODELS[name], audio=False)
    run = TrainConfig(**{**vars(load_config("vision_stage1")[0]), "compute_dtype": "bfloat16", "remat_policy": "full"})
    plan = make_plan(model, run, mesh)
    with sharding.use_mesh(mesh):
        inputs = make_abstract_inputs(plan, int(rows) * len(topology.devices), int(tokens), model)
        start = time.perf_counter()
        compiled = make_train_step(plan).lower(*inputs).compile()
    memory = compiled.memory_analysis()
    print(
        f"{name} on {slice}, mesh {axes}, {rows} examples per chip, {tokens} tokens: "
        f"arguments {memory.argument_size_in_bytes / 1e9:.2f} GB, temporary {memory.temp_size_in_bytes / 1e9:.2f} GB, "
        f"all-reduces {sum_all_reduces(compiled.as_text()) / 1e9:.2f} GB; "
        f"compiled in {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
