"""Compile the programs of a run or of generation for the devices of a topology.

They are the same functions that `vllama train` and `generate` call, on shapes in place of arrays. Importing this file
imports no jax.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from vllama_jax.config import GenerationConfig, VideoLlamaConfig
from vllama_jax.train.config import MeshConfig, TrainConfig

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from vllama_jax.memory.abstract_run import AbstractRun
    from vllama_jax.nn.llama import Llama

MEDIA_TOKENS = 40  # of a prompt: those of a video and of its sound; a multiple of 8, as `generate` pads them
FIRST_TOKENS = (1, 2)  # ids of BOS and EOS; their values do not change what is compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """The train step of a run at one padded length.

    Attributes:
        model: The model that is trained.
        run: The run; its compute dtype is named, and its mesh has no open axes.
        length: Tokens of a sequence.
    """

    model: VideoLlamaConfig
    run: TrainConfig
    length: int

    @property
    def name(self) -> str:
        """The name in tables and in JSON."""
        return "train_step"

    @property
    def mesh(self) -> MeshConfig:
        """The mesh of the run."""
        return self.run.mesh

    @property
    def rows(self) -> int:
        """Rows of a micro-batch on one device."""
        return self.run.batch_size // self.run.grad_accum_steps // (self.mesh.data * self.mesh.fsdp)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Prefill and decode of one prompt length.

    Attributes:
        name: Which of the two.
        model: The model.
        mesh: fsdp is 1: weights are sharded over tensor only.
        rows: Prompts at a time.
        length: Tokens of a prompt.
        generation: Its `max_new_tokens` and `num_beams` are used.
        scheme: How the weights are quantized; None where they are not.
    """

    name: str
    model: VideoLlamaConfig
    mesh: MeshConfig
    rows: int
    length: int
    generation: GenerationConfig
    scheme: str | None


Program = TrainStep | Generation


def abstract_train_run(program: TrainStep, mesh: "Mesh") -> "AbstractRun":
    """Make a run's state, frozen weights and batch as shapes with shardings."""
    from vllama_jax.memory.abstract_run import abstract_run

    return abstract_run(program.model, program.run, mesh, program.length)


def compile_for(program: Program, mesh: "Mesh") -> "jax.stages.Compiled":
    """Compile a program for a mesh of a topology's devices, with the options of their platform.

    Decoding starts from the state that prefill returns, in the layout that XLA chose for it: prefill is compiled first.
    """
    from vllama_jax import generate
    from vllama_jax.memory.abstract_run import lower_step
    from vllama_jax.sharding import use_mesh

    if isinstance(program, TrainStep):
        return lower_step(abstract_train_run(program, mesh), mesh).compile()
    prefill, shapes = _compile_prefill(dataclasses.replace(program, name="prefill"), mesh)
    if program.name == "prefill":
        return prefill
    llama, arguments, options = _prefill_inputs(program, mesh)
    with use_mesh(mesh):
        state = _with_shardings(shapes, prefill.output_shardings)
        decode = generate.jit_decode(mesh.devices.flat[0].platform)
        return decode.lower(llama, state, arguments[-2], strategy=options["strategy"]).compile()


@functools.lru_cache(maxsize=1)
def _compile_prefill(program: Generation, mesh: "Mesh") -> "tuple[jax.stages.Compiled, Any]":
    """Compile prefill, and return it with the abstract state that it returns. Cached for decode, compiled next."""
    from vllama_jax import generate
    from vllama_jax.sharding import use_mesh

    llama, arguments, options = _prefill_inputs(program, mesh)
    with use_mesh(mesh):
        lowered = generate.jit_prefill(mesh.devices.flat[0].platform).lower(llama, *arguments, **options)
        return lowered.compile(), lowered.out_info


def _prefill_inputs(program: Generation, mesh: "Mesh") -> tuple["Llama", list[Any], dict[str, Any]]:
    """Make the abstract language model, and the arguments and static arguments of `generate.jit_prefill`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from vllama_jax import generate

    replicated = NamedSharding(mesh, PartitionSpec())

    def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    bos, eos = FIRST_TOKENS
    settings = generate._make_settings(program.generation, bos, eos, ())
    settings = jax.tree.map(lambda leaf: abstract(np.shape(leaf), leaf.dtype), settings)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rows, length = program.rows, generate.padded_prompt_length(program.length)
    llama = abstract_llama(program, mesh)
    arguments = [
        abstract((rows, length), jnp.int32),
        abstract((rows, length), jnp.bool_),
        abstract((rows,), jnp.int32),
        abstract((rows, MEDIA_TOKENS, program.model.llama.width), llama.embedding.dtype),
        settings,
        abstract(key.shape, key.dtype),
    ]
    beams = program.generation.num_beams
    strategy = generate.DecodingStrategy(beams, program.generation.temperature > 0, program.generation.top_k)
    capacity = -(-program.generation.max_new_tokens // 64) * 64
    return llama, arguments, {"new_token_capacity": capacity, "strategy": strategy}


def abstract_llama(program: Generation, mesh: "Mesh") -> "Llama":
    """Make the abstract language model that `load` returns: bfloat16, unstacked, sharded over tensor."""
    from flax import nnx

    from vllama_jax.checkpoints.quantize import abstract_layers
    from vllama_jax.sharding import shard_abstract

    network, _ = abstract_layers(program.model, "bfloat16", program.scheme)
    graph, state = nnx.split(network.llama)
    llama = nnx.merge(graph, shard_abstract(state, mesh, fsdp=False))
    llama.unstack(mesh.devices.flat[0].platform)
    return llama


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    import jax

    return jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes, shardings
    )
