"""The blocks of the EVA ViT, compiled ahead of time for TPU chips: expected time and memory, before and after.

    pip install 'vllama-jax[aot]'
    JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 python benchmarks/frozen_encoders.py [TOPOLOGY] [DATA,FSDP,TENSOR] \
        [IMAGES A CHIP]
    python benchmarks/frozen_encoders.py v5e:1x1 1,1,1 64

No TPU is needed and nothing is run. Four blocks of the published size are compiled in bfloat16, and scaled to 39. The
two lines are the einsum on all images at once, and the Pallas kernel on groups of 64 images. XLA's cycles do not
include the kernel and transfers between chips. The kernel's time is from its own schedule, for v5e.
"""

import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vllama_jax import config, sharding
from vllama_jax.aot import costs, hlo
from vllama_jax.aot.compiler import topology_mesh
from vllama_jax.aot.topologies import parse_topology
from vllama_jax.nn import layers
from vllama_jax.nn.attention import attend_with_einsum, self_attend
from vllama_jax.runtime.xla_options import compiler_options
from vllama_jax.train.config import MeshConfig

DEPTH = 4
VIT = config.video_llama(config.LLAMA_7B, audio=False).vit

# Instruction bundles (each at least one cycle) of the kernel's program for one image and four heads of the ViT on v5e.
# LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIRECTORY --xla_jf_dump_llo_text=true" writes them (libtpu 0.0.42.1): the file
# *frozen_attention*schedule-analysis_final_bundles.txt.
KERNEL_BUNDLES = 2367


def compile_blocks(mesh: Mesh, images: int) -> jax.stages.Compiled:
    """Compile the run of four abstract blocks on `images` images for each device of a mesh."""
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
        lowered = jax.jit(lambda *arguments: layers.run_blocks(*arguments)).lower(blocks, x)
        return lowered.compile(compiler_options("tpu", "train_step"))


def main(name: str = "v5e:1x1", axes: str = "1,1,1", images: str = "64") -> None:
    """Print a line for the einsum and one for the kernel."""
    topology = parse_topology(name)
    data, fsdp, tensor = map(int, axes.split(","))
    mesh = topology_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), topology)
    to_milliseconds = 1000 * VIT.depth / DEPTH / topology.chip.clock
    blocks_of_kernel = int(images) * VIT.num_heads // mesh.shape["tensor"] // 4
    for implementation, attention, rows in (
        ("einsum, all images at once", attend_with_einsum, int(images)),
        ("kernel, groups of 64", self_attend, 64),
    ):
        layers.self_attend, layers._GROUP_ROWS = attention, rows
        compiled = compile_blocks(mesh, int(images))
        kernel = DEPTH * blocks_of_kernel * KERNEL_BUNDLES if attention is self_attend else 0
        outside = costs.analyze(hlo.parse_hlo(compiled.as_text())).cycles
        print(
            f"{topology.name}, mesh {axes}, {images} images a chip, {implementation}: "
            f"{outside * to_milliseconds:.0f} ms + {kernel * to_milliseconds:.0f} ms in the kernel, "
            f"temporary memory {compiled.memory_analysis().temp_size_in_bytes / 1e6:.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
