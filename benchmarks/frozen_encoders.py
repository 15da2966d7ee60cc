"""The blocks of the EVA ViT, compiled ahead of time for TPU chips: time by XLA's estimated cycles, before and after.

    pip install libtpu
    JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 python benchmarks/frozen_encoders.py [TOPOLOGY] [DATA,FSDP,TENSOR] \
        [IMAGES A CHIP]
    python benchmarks/frozen_encoders.py v5e:1x1 1,1,1 64

No TPU is needed and nothing is run. Four blocks of the published size are compiled in bfloat16, and scaled to 39. The
two lines are the einsum on all images at once, and the Pallas kernel on chunks of 32. XLA's cycles do not include the
kernel and transfers between chips. The kernel's time is from its own schedule, for v5e.
"""

import re
import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tpu_compile import computations

from vllama_jax import config, sharding
from vllama_jax.nn import layers
from vllama_jax.nn.attention import attend_with_einsum, self_attend

DEPTH = 4
VIT = config.video_llama(config.LLAMA_7B, audio=False).vit
CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}  # Hz

# With it, XLA may split each product into a loop that sends weights from chip to chip, at twice the time on 8 chips.
WINDOWED_EINSUM_OFF = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

# Instruction bundles (each at least one cycle) of the kernel's program for one image and four heads of the ViT on v5e.
# LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIRECTORY --xla_jf_dump_llo_text=true" writes them (libtpu 0.0.42.1): the file
# *frozen_attention*schedule-analysis_final_bundles.txt.
KERNEL_BUNDLES = 2367


def count_cycles(text: str) -> int:
    """Sum XLA's estimates of a program's instructions, those in loops once for each iteration."""
    bodies = computations(text)

    def visit(name: str) -> int:
        total = 0
        for line in bodies[name].splitlines():
            estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
            total += int(estimate[1]) if estimate else 0
            if loop := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                limits = known or max(re.findall(r"constant\((\d+)\)", bodies[loop[1]]), key=int)
                total += visit(loop[2]) * int(limits[1] if known else limits)
        return total

    return visit(re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)[1])


def compile_blocks(mesh: Mesh, images: int) -> jax.stages.Compiled:
    blocks = nnx.eval_shape(
        lambda: layers.stack(
            lambda rngs: layers.PreNormBlock(VIT.width, VIT.num_heads, VIT.mlp_dim, VIT.norm_eps, rngs=rngs),
            DEPTH,
            nnx.Rngs(0),
        )
    )
    graph, state = nnx.split(blocks)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), state)
    blocks = nnx.merge(graph, sharding.shard_abstract(state, mesh))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    shape = (images * mesh.shape["data"] * mesh.shape["fsdp"], VIT.num_patches + 1, VIT.width)
    with sharding.use_mesh(mesh):
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)
        return jax.jit(lambda *arguments: layers.run_blocks(*arguments)).lower(blocks, x).compile(WINDOWED_EINSUM_OFF)


def main(slice: str = "v5e:1x1", axes: str = "1,1,1", images: str = "64") -> None:
    one_chip = {"chips_per_host_bounds": [1, 1, 1]} if slice.endswith(":1x1") else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=slice, **one_chip)
    mesh = sharding.make_mesh(*map(int, axes.split(",")), devices=topology.devices)
    to_milliseconds = 1000 * VIT.depth / DEPTH / CLOCK[slice.split(":")[0]]
    blocks_of_kernel = int(images) * VIT.num_heads // mesh.shape["tensor"] // 4
    for name, attention, chunk in (
        ("einsum, all images at once", attend_with_einsum, 2 * int(images) + 1),
        ("kernel, chunks of 32 images", self_attend, 32),
    ):
        layers.self_attend, layers._CHUNK_ROWS = attention, chunk
        compiled = compile_blocks(mesh, int(images))
        kernel = DEPTH * blocks_of_kernel * KERNEL_BUNDLES if attention is self_attend else 0
        outside = count_cycles(compiled.as_text())
        print(
            f"{slice}, mesh {axes}, {images} images a chip, {name}: "
            f"{outside * to_milliseconds:.0f} ms + {kernel * to_milliseconds:.0f} ms in the kernel, "
            f"temporary memory {compiled.memory_analysis().temp_size_in_bytes / 1e6:.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
