"""Compile the programs of a run or of generation for the devices of a topology.

They are the same functions that `vllama train` and `generate` call, on shapes in place of arrays. Importing this file
imports no jax.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from vllama_jax.config import GenerationConfig, VideoLlamaConfig
from vllama_jax.train.config import MeshConfig, TrainConfig

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from vllama_jax.generate.beam_search import BeamState
    from vllama_jax.generate.programs import Chunk, DecodingState, StateShape
    from vllama_jax.memory.abstract_run import AbstractRun
    from vllama_jax.nn.llama import Llama

EOS = 2  # its value does not change what is compiled


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
        rows: Answers at a time. Prefill processes one prompt at a time.
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


def compile_for(program: Program, mesh: "Mesh", options: dict[str, str | bool] | None = None) -> "jax.stages.Compiled":
    """Compile a program for a mesh of a topology's devices.

    Args:
        program: The program.
        mesh: The mesh.
        options: Compiler options, in addition to those of the platform (`vllama_jax.runtime.xla_options`).
    """
    import numpy as np

    from vllama_jax.generate import beam_search, programs
    from vllama_jax.memory.abstract_run import lower_step
    from vllama_jax.sharding import use_mesh

    if isinstance(program, TrainStep):
        return lower_step(abstract_train_run(program, mesh), mesh).compile(options)
    platform, shape = mesh.devices.flat[0].platform, _state_shape(program)
    llama, state = abstract_llama(program, mesh), _abstract_state(program, mesh)
    with use_mesh(mesh):
        if program.name == "prefill":
            return programs.jit_prefill(platform).lower(llama, state, _abstract_chunk(program, mesh)).compile(options)
        if program.generation.num_beams > 1:
            beams, penalty = _abstract_beams(program, state, mesh), _abstract((), np.float32, mesh)
            return beam_search.jit_search(platform).lower(llama, beams, penalty, shape=shape).compile(options)
        return programs.jit_decode(platform).lower(llama, state, shape=shape).compile(options)


def _state_shape(program: Generation) -> "StateShape":
    from vllama_jax.generate.engine import shape_for

    return shape_for(program.length, program.generation.max_new_tokens)


def _abstract_state(program: Generation, mesh: "Mesh") -> "DecodingState":
    """Make the state of generation as shapes, with the shardings that the compiled program for an empty state gives."""
    import jax
    import numpy as np

    from vllama_jax.generate import choose, programs
    from vllama_jax.sharding import use_mesh

    settings = choose.make_settings(program.generation, [EOS], ())
    settings = jax.tree.map(lambda leaf: _abstract((program.rows, *leaf.shape[1:]), leaf.dtype, mesh), settings)
    static = {"cfg": program.model.llama, "shape": _state_shape(program), "cache_dtype": "bfloat16"}
    with use_mesh(mesh):
        lowered = programs.empty_state.lower(settings, _abstract((), np.int32, mesh), **static)
        return _with_shardings(lowered.out_info, lowered.compile().output_shardings)


def _abstract_beams(program: Generation, state: "DecodingState", mesh: "Mesh") -> "BeamState":
    """Make the state of beam search from that of its prompts; see `_abstract_state`."""
    import numpy as np

    from vllama_jax.generate.beam_search import start_beams

    logits = [_abstract((1, program.model.llama.vocab_size), np.float32, mesh)] * program.rows
    beams = program.generation.num_beams
    lowered = start_beams.lower(state, logits, _abstract((), np.float32, mesh), num_beams=beams)
    return _with_shardings(lowered.out_info, lowered.compile().output_shardings)


def _abstract_chunk(program: Generation, mesh: "Mesh") -> "Chunk":
    import numpy as np

    from vllama_jax.generate.engine import chunk_length
    from vllama_jax.generate.programs import Chunk

    length = chunk_length(program.length)
    scalar = _abstract((), np.int32, mesh)
    return Chunk(
        ids=_abstract((1, length), np.int32, mesh),
        is_media=_abstract((1, length), np.bool_, mesh),
        media=_abstract((1, length, program.model.llama.width), np.float32, mesh),
        length=scalar,
        row=scalar,
        start=scalar,
    )


def _abstract(shape: tuple[int, ...], dtype: Any, mesh: "Mesh") -> Any:
    """Return the shape of a replicated array."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


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
