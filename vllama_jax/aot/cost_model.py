"""Estimates of a train step on GPUs by arithmetic, because XLA needs the device to compile for a GPU."""

import jax
import jax.numpy as jnp

from vllama_jax.aot.costs import Costs, LoopCost
from vllama_jax.aot.programs import TrainStep
from vllama_jax.aot.report import ProgramReport, time_fields
from vllama_jax.aot.topologies import Topology
from vllama_jax.memory.abstract_run import AbstractRun, abstract_run
from vllama_jax.memory.estimate import DEVICES, estimate_training
from vllama_jax.memory.flops import step_flops
from vllama_jax.train.config import MeshConfig

FLOAT32_BYTES = 4
NOTE = (
    "Not compiled: XLA compiles for a GPU only where there is one. Memory, FLOPs and bytes are estimates "
    "(`vllama memory`), and the expected time is a lower bound: the longest of the three rooflines."
)


def estimate_step(program: TrainStep, topology: Topology) -> ProgramReport:
    """Estimate a train step on GPUs.

    Memory traffic is that of the weights alone, so the roofline of memory is a lower bound. The network carries the
    frozen weights that FSDP gathers, the sums of tensor parallelism, and the gradients.
    """
    run, mesh, chip = program.run, program.mesh, topology.chip
    axes = jax.sharding.AbstractMesh((mesh.data, mesh.fsdp, mesh.tensor), ("data", "fsdp", "tensor"))
    abstract = abstract_run(program.model, run, axes, program.length)
    flops = step_flops(program.model, run.branch, abstract.batch, run.remat_policy) / topology.count
    passes = 3 if run.remat_policy == "full" else 2
    gathers = 2 * run.grad_accum_steps  # for the forward pass, and for recomputation and backward pass together
    llama, others = _frozen_bytes(abstract, mesh)
    kinds = {
        "all-gather": (gathers * llama + run.grad_accum_steps * others) * (mesh.fsdp - 1) / mesh.fsdp,
        "all-reduce": _reduced_bytes(program, abstract, passes),
    }
    traffic = run.grad_accum_steps * (passes * llama + others)
    groups = {mesh.fsdp: kinds["all-gather"], topology.count: kinds["all-reduce"]}
    if mesh.fsdp == topology.count:
        groups = {topology.count: sum(kinds.values())}
    costs = Costs(flops, kinds, loops=(LoopCost("step", 1, bytes_by_group=groups, hbm_bytes=traffic),))
    device = DEVICES[chip.name]
    need = estimate_training(program.model, "", run, mesh, device, program.length)
    return ProgramReport(
        topology=topology.name,
        program=program.name,
        mesh=(mesh.data, mesh.fsdp, mesh.tensor),
        rows=program.rows,
        tokens=program.length,
        compiled=False,
        fits=need.device_total <= chip.hbm_bytes,
        hbm_bytes_per_chip=need.device_total,
        hbm_bytes={},
        hbm_limit_bytes=chip.hbm_bytes,
        note=NOTE,
        **time_fields(costs, topology, flops, run.batch_size) | {"mfu": None},  # of a bound, it would mean nothing
    )


def _frozen_bytes(abstract: AbstractRun, mesh: MeshConfig) -> tuple[float, float]:
    """Compute the bytes of gathered frozen weights on a device: of the language model, and of the encoders."""
    sizes = {path: leaf.size * leaf.dtype.itemsize / mesh.tensor for path, leaf in abstract.frozen.items()}
    llama = sum(size for path, size in sizes.items() if path.startswith("llama/"))
    return llama, sum(sizes.values()) - llama


def _reduced_bytes(program: TrainStep, abstract: AbstractRun, passes: int) -> float:
    """Compute the bytes of all-reduces: gradients over data and fsdp, and two products per layer over tensor."""
    mesh, llama = program.mesh, program.model.llama
    places = mesh.data * mesh.fsdp
    trainable = sum(leaf.size for leaf in abstract.state.weights.values()) * FLOAT32_BYTES
    gradients = 2 * trainable * (places - 1) / places
    tokens = program.rows * program.run.grad_accum_steps * program.length
    products = 2 * llama.depth * passes * tokens * llama.width * jnp.dtype(abstract.config.compute_dtype).itemsize
    return gradients + 2 * products * (mesh.tensor - 1) / mesh.tensor
