"""Compile programs for TPU topologies in a separate process.

When libtpu is loaded, it searches for TPUs, prints warnings if there are none, and may hold a lock. Therefore only the
separate process loads it. JAX_PLATFORMS=cpu keeps JAX from starting a TPU backend there.
"""

import contextlib
import ctypes
import functools
import importlib.util
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllama_jax.aot.costs import Costs, analyze
from vllama_jax.aot.hlo import parse_hlo
from vllama_jax.aot.programs import Program, TrainStep, abstract_train_run, compile_for
from vllama_jax.aot.report import ProgramReport, time_fields
from vllama_jax.aot.topologies import Topology
from vllama_jax.errors import ConfigError, VllamaError, format_error
from vllama_jax.memory.chips import GIB
from vllama_jax.train.config import MeshConfig

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may compile too
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask Google Cloud's metadata server what this machine is
}
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal for this process when its parent ends
# "… memory required for HLO temporaries (64.00G) exceeds available HBM (15.75G)", "Used 20.33G of 15.75G hbm"
OUT_OF_MEMORY = re.compile(r"\((\d+(?:\.\d+)?)G\) exceeds available|Used (\d+(?:\.\d+)?)G of")


Job = tuple[Topology, Program]


def compile_all(jobs: Sequence[Job], on_start: Callable[[int], None]) -> Iterator[ProgramReport]:
    """Compile programs one after the other in another process; estimate those for GPUs.

    Args:
        jobs: Programs with the chips that they run on.
        on_start: Called with the number of each job before it starts.

    Yields:
        The report of each program.

    Raises:
        ConfigError: libtpu is not installed, or a mesh cannot be built.
        VllamaError: The compiler failed for another reason than memory.
    """
    for_tpus = any(topology.chip.platform == "tpu" for topology, _ in jobs)
    if for_tpus and importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compiling for TPUs needs libtpu, which is not installed: pip install 'vllama-jax[aot]'")
    with contextlib.ExitStack() as stack:
        worker = None
        for number, (topology, program) in enumerate(jobs):
            on_start(number)
            if topology.chip.platform == "gpu":
                yield _estimate(program, topology)
                continue
            worker = worker or stack.enter_context(_start_worker())
            yield worker(program, topology)


@contextlib.contextmanager
def _start_worker() -> Iterator[Callable[[Program, Topology], ProgramReport]]:
    """Yield a function that calls `compile_program` in another process, which is killed at the end of the context."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "stderr")
        process = context.Process(target=_work, args=(there, str(log)), daemon=True)
        process.start()
        there.close()

        def call(program: Program, topology: Topology) -> ProgramReport:
            try:
                here.send((program, topology))
                result = here.recv()
            except (EOFError, OSError) as error:
                raise VllamaError(f"the compiler's process ended: {_last_line(log)}") from error
            if isinstance(result, VllamaError):
                raise result
            return result

        try:
            yield call
        finally:
            process.kill()
            process.join()


def _work(pipe: Connection, log: str) -> None:
    """Compile the programs that a pipe delivers until it is closed. Warnings of libtpu go to the file `log`."""
    os.environ |= ENVIRONMENT  # before jax is imported
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which kills this process
    if sys.platform == "linux":  # as libtpu needs; XLA keeps the GIL while it compiles, so that no thread could do this
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # it was killed before
        return
    with contextlib.suppress(EOFError):
        while True:
            program, topology = pipe.recv()
            try:
                pipe.send(compile_program(program, topology))
            except VllamaError as error:
                pipe.send(error)


def _estimate(program: Program, topology: Topology) -> ProgramReport:
    from vllama_jax.aot.cost_model import estimate_step

    if not isinstance(program, TrainStep):
        raise ConfigError(f"topology {topology.name}: prefill and decode are compiled for TPUs only")
    return estimate_step(program, topology)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it may have run out of host memory")


@functools.lru_cache(maxsize=8)
def topology_mesh(axes: MeshConfig, topology: Topology) -> "Mesh":
    """Make the mesh of a topology's devices. It is cached because meshes of two calls would not be equal."""
    from jax.experimental import topologies

    from vllama_jax.sharding import make_mesh

    # libtpu assumes hosts of four chips, unless told otherwise
    options = {"chips_per_host_bounds": (1, 1, 1)} if topology.count == 1 else {}
    devices = topologies.get_topology_desc(topology.name, "tpu", **options).devices
    return make_mesh(axes.data, axes.fsdp, axes.tensor, devices=devices)


def compile_program(program: Program, topology: Topology) -> ProgramReport:
    """Compile a program in this process and report its costs. Too little memory is a result, not an error."""
    import jax

    from vllama_jax.generate.engine import chunk_length

    mesh = topology_mesh(program.mesh, topology)
    fields: dict[str, Any] = {
        "topology": topology.name,
        "program": program.name,
        "mesh": (program.mesh.data, program.mesh.fsdp, program.mesh.tensor),
        "rows": program.rows,
        "tokens": chunk_length(program.length) if program.name == "prefill" else program.length,
        "compiled": True,
        "hbm_limit_bytes": topology.chip.hbm_bytes,
    }
    start_time = time.perf_counter()
    try:
        compiled, text = _compile_to_text(program, mesh)
    except jax.errors.JaxRuntimeError as error:
        found = OUT_OF_MEMORY.search(str(error))
        if found is None:
            raise VllamaError(f"{program.name} on {topology.name}: {format_error(error)}") from error
        needed = int(float(found[1] or found[2]) * GIB)
        return ProgramReport(**fields, fits=False, hbm_bytes_per_chip=needed, hbm_bytes={})
    seconds = time.perf_counter() - start_time
    sizes = _memory_by_kind(compiled.memory_analysis())
    total = sum(sizes.values())
    costs = _costs(program, text)
    return ProgramReport(
        **fields,
        fits=total <= topology.chip.hbm_bytes,
        hbm_bytes_per_chip=total,
        hbm_bytes=sizes,
        compile_seconds=seconds,
        **time_fields(costs, topology, _model_flops(program, mesh) / topology.count, _samples(program)),
    )


def _compile_to_text(program: Program, mesh: "Mesh") -> tuple["jax.stages.Compiled", str]:
    """Compile a program; return its HLO text too.

    jaxlib refuses a few modules of a newer libtpu ("async-update instruction should have 1 operands but sees 3", 13B on
    v5p), which libtpu itself can write as text. Both texts are equal where both exist.
    """
    import jax

    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_for(program, mesh, {"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        try:
            return compiled, compiled.as_text() or ""
        except jax.errors.JaxRuntimeError:
            texts = list(Path(folder).glob("*.after_codegen.txt"))
            if len(texts) != 1:
                raise
            return compiled, texts[0].read_text()


def _memory_by_kind(analysis: Any) -> dict[str, int]:
    """Return XLA's memory figures for a chip by kind. Donated arguments share memory with results and count once."""
    return {
        "arguments": analysis.argument_size_in_bytes,
        "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }


def _costs(program: Program, text: str) -> Costs:
    """Return the costs of one call of a program, or of one token for decode, whose number of steps depends on data."""
    from vllama_jax.generate import TOKENS_PER_DISPATCH

    module = parse_hlo(text)
    if program.name != "decode":
        return analyze(module)
    return analyze(module, dynamic_trips=TOKENS_PER_DISPATCH).divide(TOKENS_PER_DISPATCH)


def _model_flops(program: Program, mesh: "Mesh") -> float:
    """Compute the FLOPs of the model by arithmetic, on all chips together."""
    from vllama_jax.generate import padded_prompt_length
    from vllama_jax.generate.engine import chunk_length
    from vllama_jax.memory.flops import forward_flops, step_flops

    if isinstance(program, TrainStep):
        batch = abstract_train_run(program, mesh).batch
        return step_flops(program.model, program.run.branch, batch, program.run.remat_policy)
    if program.name == "prefill":
        length = chunk_length(program.length)
        return forward_flops(program.model.llama, 1, length, length)
    return forward_flops(program.model.llama, program.rows, 1, padded_prompt_length(program.length))


def _samples(program: Program) -> int:
    """Return the number of rows of a train step, of prompts of a prefill, or of tokens of a decoding step."""
    if isinstance(program, TrainStep):
        return program.run.batch_size
    return 1 if program.name == "prefill" else program.rows
