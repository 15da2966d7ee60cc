"""The training step of the vision branch, compiled ahead of time for a TPU slice: what a chip holds, and what it sums.

    pip install libtpu
    python benchmarks/tpu_compile.py [MODEL] [TOPOLOGY] [DATA,FSDP,TENSOR] [SAMPLES A CHIP] [TOKENS]
    python benchmarks/tpu_compile.py 7b v5e:4x4 1,16,1 4 128

No TPU is needed and nothing is run: libtpu compiles for a topology by its name. It is the step of `vllama train` with
every part of the vision branch at full size: bfloat16, full remat, AdamW, the state donated. All-reduces are counted as
twice what they put out, in a loop over layers once for each: where activations are not held to the batch's axes, the
compiler multiplies with shards of weights and sums the products, which is hundreds of GB.
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
    abstract_model = AbstractModel(abstract_network(model, run.compute_dtype))
    trainable_paths = tuple(select_paths(list(abstract_model.variables), run.trainable))
    optimizer = make_optimizer(run.optim, run.steps)
    return RunPlan(run, None, mesh, abstract_model, trainable_paths, dict.fromkeys(trainable_paths), optimizer, None)


def abstract_inputs(plan: RunPlan, rows: int, tokens: int, model: config.VideoLlamaConfig) -> tuple:
    abstract_model = plan.abstract_model
    frozen = {
        path: jax.ShapeDtypeStruct(abstract_model.variables[path].shape, plan.dtype, sharding=place)
        for path, place in abstract_model.shardings(
            abstract_model.variables.keys() - set(plan.trainable_paths), plan.mesh
        ).items()
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


def computations(text: str) -> dict[str, str]:
    """The bodies of an HLO module's computations, by name."""
    return {
        found[1]: found[2] for found in re.finditer(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    }


def summed(text: str) -> float:
    """Bytes of all-reduces in a step."""
    bodies, seen = computations(text), set()

    def visit(name: str, turns: int) -> float:
        total, body = 0.0, bodies[name]
        for result, channel in ALL_REDUCE.findall(body):
            sizes = [BYTES[t] * math.prod(map(int, filter(None, d.split(",")))) for t, d in ARRAY.findall(result)]
            total += 0 if channel in seen else 2 * turns * sum(sizes)
            seen.add(channel)
        for condition, inner in re.findall(r"while\(.*?condition=%?([\w.-]+), body=%?([\w.-]+)", body):
            limits = map(int, re.findall(r"constant\((\d+)\)", bodies[condition]))
            total += visit(inner, turns * max(limits, default=1))
        called = re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", body)
        return total + sum(visit(inner, turns) for inner in called if inner in bodies)

    return visit(re.search(r"^ENTRY %?([\w.-]+)", text, re.M)[1], 1)


def main(name: str = "7b", slice: str = "v5e:4x4", axes: str = "1,16,1", rows: str = "4", tokens: str = "128") -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=slice)
    mesh = sharding.make_mesh(*map(int, axes.split(",")), devices=topology.devices)
    model = config.video_llama(MODELS[name], audio=False)
    run = TrainConfig(**{**vars(load_config("vision_stage1")[0]), "compute_dtype": "bfloat16", "remat_policy": "full"})
    plan = make_plan(model, run, mesh)
    with sharding.use_mesh(mesh):
        inputs = abstract_inputs(plan, int(rows) * len(topology.devices), int(tokens), model)
        begun = time.perf_counter()
        compiled = make_train_step(plan).lower(*inputs).compile()
    memory = compiled.memory_analysis()
    print(
        f"{name} on {slice}, mesh {axes}, {rows} samples a chip, {tokens} tokens: "
        f"arguments {memory.argument_size_in_bytes / 1e9:.2f} GB, temporary {memory.temp_size_in_bytes / 1e9:.2f} GB, "
        f"all-reduced {summed(compiled.as_text()) / 1e9:.2f} GB; compiled in {time.perf_counter() - begun:.0f} s"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
