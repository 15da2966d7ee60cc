"""`vllama compile` without the TPU compiler: options, reports, estimates, and compiling for CPU devices."""

import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import psutil
import pytest
from rich.console import Console

from vllama_jax import cli, sharding
from vllama_jax.aot import compiler
from vllama_jax.aot.costs import Costs, LoopCost
from vllama_jax.aot.programs import Generation, TrainStep, abstract_train_run
from vllama_jax.aot.report import ProgramReport, print_reports, time_fields
from vllama_jax.aot.topologies import parse_topology
from vllama_jax.config import GREEDY, tiny
from vllama_jax.data.config import DatasetConfig
from vllama_jax.errors import VllamaError
from vllama_jax.memory.abstract_run import lower_step
from vllama_jax.train.config import MeshConfig, TrainConfig

V5E = parse_topology("v5e:2x2")
KEYS = {
    *("topology", "program", "tokens", "fits", "hbm_bytes_per_chip", "hbm_limit_bytes", "flops_per_chip"),
    *("collective_bytes", "mfu", "compile_seconds", "binds", "samples_per_second", "compute_ms", "memory_ms"),
}


def train_step(mesh: MeshConfig, rows: int = 2, **options) -> TrainStep:
    size = rows * mesh.data * mesh.fsdp
    run = TrainConfig(model="m", datasets=(DatasetConfig(path="d"),), steps=1, batch_size=size, mesh=mesh, **options)
    return TrainStep(model=tiny(), run=run, length=48)


@pytest.fixture
def on_cpus(monkeypatch):
    """The topology's chips are devices of this process."""

    def mesh_of(axes, topology):
        return sharding.make_mesh(*dataclasses.astuple(axes), devices=jax.devices()[: topology.count])

    monkeypatch.setattr(compiler, "topology_mesh", mesh_of)


def compile_command(capsys, *arguments: object) -> list[dict]:
    cli.main(["compile", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_step_of_a_run_is_compiled(on_cpus):
    program = train_step(MeshConfig(data=2, fsdp=2), compute_dtype="float32")
    report = compiler.compile_program(program, V5E)
    assert (report.topology, report.program, report.mesh, report.rows, report.tokens) == (
        *("v5e:2x2", "train_step", (2, 2, 1)),
        *(2, 48),
    )
    assert report.fits
    assert report.compiled
    assert report.hbm_bytes_per_chip == sum(report.hbm_bytes.values())
    assert report.collective_bytes["all-gather"] > 0
    assert report.flops_per_chip == pytest.approx(report.model_flops_per_chip, rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_generation_is_compiled(on_cpus, name):
    mesh = MeshConfig(data=1, fsdp=1, tensor=4)
    program = Generation(name=name, model=tiny(), mesh=mesh, rows=2, length=50, generation=GREEDY, scheme=None)
    report = compiler.compile_program(program, V5E)
    assert (report.program, report.tokens) == (name, {"prefill": 64, "decode": 50}[name])
    assert report.collective_bytes["all-reduce"] > 0, "heads are shared by four chips"
    assert report.flops_per_chip > 0.9 * report.model_flops_per_chip


def test_layers_do_not_make_a_step_longer_to_compile():
    """Layers are in loops, so a program with eight times as many has as many operations."""
    mesh, step = sharding.make_mesh(devices=jax.devices()[:1]), train_step(MeshConfig(data=1), compute_dtype="float32")

    def count_operations(factor: int) -> int:
        vit, llama = (dataclasses.replace(it, depth=factor * it.depth) for it in (step.model.vit, step.model.llama))
        deeper = dataclasses.replace(step, model=dataclasses.replace(step.model, vit=vit, llama=llama))
        return lower_step(abstract_train_run(deeper, mesh), mesh).as_text().count("\n")

    assert count_operations(8) == count_operations(1)


@pytest.mark.slow
def test_a_program_whose_text_jaxlib_refuses_is_read_as_libtpu_wrote_it(on_cpus, monkeypatch):
    program = Generation(
        name="prefill", model=tiny(), mesh=MeshConfig(data=4), rows=4, length=50, generation=GREEDY, scheme=None
    )
    expected = compiler.compile_program(program, V5E)
    compile_for = compiler.compile_for

    def refuse():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    def compile_to_refused(program, mesh, options):
        compiled = compile_for(program, mesh)
        Path(options["xla_dump_to"], "module_0000.jit_prefill.after_codegen.txt").write_text(compiled.as_text())
        return SimpleNamespace(memory_analysis=compiled.memory_analysis, as_text=refuse)

    monkeypatch.setattr(compiler, "compile_for", compile_to_refused)
    report = compiler.compile_program(program, V5E)
    assert dataclasses.replace(report, compile_seconds=expected.compile_seconds) == expected


WORK = """
import multiprocessing
from vllama_jax.aot import compiler
class Busy:
    def __reduce__(self):
        return pow, (3, 10**9)  # keeps the GIL for minutes, as XLA does while it compiles
with compiler._start_worker() as call:
    print(multiprocessing.active_children()[0].pid, flush=True)
    call(Busy(), None)
"""


@pytest.mark.slow
def test_the_compiler_ends_when_the_command_is_killed():
    with subprocess.Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, text=True) as command:
        compiler_process = psutil.Process(int(command.stdout.readline()))
        time.sleep(6)  # until it is busy
        command.kill()
    assert psutil.wait_procs([compiler_process], timeout=30)[1] == []


def test_out_of_memory_is_a_result(on_cpus, monkeypatch):
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (64.00G) "

    def refuse(program, mesh, options):
        raise jax.errors.JaxRuntimeError(message + "exceeds available HBM (15.75G).")

    monkeypatch.setattr(compiler, "compile_for", refuse)
    report = compiler.compile_program(train_step(MeshConfig(data=4)), V5E)
    assert (report.fits, report.binds, report.mfu) == (False, "capacity", None)
    assert report.hbm_bytes_per_chip == 64 * 2**30
    assert report.hbm_limit_bytes == int(15.75 * 2**30)


def test_other_errors_of_the_compiler_are_one_line(on_cpus, monkeypatch):
    def fail(program, mesh, options):
        raise jax.errors.JaxRuntimeError("INTERNAL: it\nbroke")

    monkeypatch.setattr(compiler, "compile_for", fail)
    with pytest.raises(VllamaError, match=r"^train_step on v5e:2x2: INTERNAL: it broke$"):
        compiler.compile_program(train_step(MeshConfig(data=4)), V5E)


def test_expected_time_adds_loops_in_which_the_network_hides_or_does_not():
    """Loop one: 1.5e9 cycles are 1 s, its network 0.5 s. Loop two: 0.5 s of work wait for 1 s of network."""
    ring = V5E.network_bandwidth(4)
    loops = (
        LoopCost("one", 4, 1.5e9, {4: 0.5 * ring}, hbm_bytes=819e9 / 4),
        LoopCost("two", 4, 0.75e9, {4: ring}, hbm_bytes=819e9 / 4),
    )
    costs = Costs(197e12, {"all-gather": 1.5 * ring}, loops)
    fields = time_fields(costs, V5E, model_flops=0.5 * 197e12, samples=64)
    assert fields["step_ms"] == pytest.approx(2000)
    assert (fields["compute_ms"], fields["memory_ms"], fields["network_ms"]) == pytest.approx((1000, 500, 1500))
    assert fields["binds"] == "network"
    assert fields["mfu"] == pytest.approx(0.25)
    assert fields["samples_per_second"] == pytest.approx(32)


def test_expected_time_is_at_least_that_of_the_hbm_traffic_of_each_loop():
    """Loop one: 0.5 s of cycles, and 1 s of traffic. Loop two: 0.5 s of cycles, and little traffic."""
    loops = (LoopCost("one", 1, 0.75e9, hbm_bytes=V5E.chip.hbm_bandwidth), LoopCost("two", 1, 0.75e9, hbm_bytes=1e6))
    fields = time_fields(Costs(1e12, {}, loops), V5E, model_flops=1e12, samples=1)
    assert (fields["schedule_ms"], fields["step_ms"]) == pytest.approx((1000, 1500))


def test_expected_time_includes_kernels_at_the_roofline():
    """0.5 s of cycles, and 0.25 s of the kernel's FLOPs in one loop, or 0.5 s of its bytes in the other."""
    chip = V5E.chip
    compute = LoopCost("one", 1, 0.75e9, kernel_flops=chip.flops / 4, kernel_bytes=chip.hbm_bandwidth / 8)
    memory = LoopCost("two", 1, 0.75e9, kernel_flops=chip.flops / 4, kernel_bytes=chip.hbm_bandwidth / 2)
    fields = time_fields(Costs(1e12, {}, (compute, memory)), V5E, model_flops=1e12, samples=1)
    assert fields["schedule_ms"] == fields["step_ms"] == pytest.approx(1750)


def test_tables_have_at_most_80_columns():
    report = ProgramReport(
        topology="v5p:16x16x24",
        program="train_step",
        mesh=(1536, 128, 16),
        rows=1024,
        tokens=8192,
        compiled=True,
        fits=True,
        hbm_bytes_per_chip=95 * 10**9,
        hbm_limit_bytes=102 * 10**9,
        hbm_bytes={"temporaries": 10**10},
        collective_bytes={"collective-permute": 10**11},
        step_ms=12345.6,
        mfu=0.5,
        samples_per_second=12345678.9,
        binds="network",
    )
    text = io.StringIO()
    print_reports([report] * 5, Console(file=text, soft_wrap=True, width=200))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("v5p:16x16x24") for line in lines) == 2, "four programs side by side, then one"


def test_gpus_are_estimated_and_the_report_says_so(capsys):
    flags = ["--model", "7b", "--topology", "H100:8", "8xH200", "--rows", 8, "--length", 72]
    reports = compile_command(capsys, "vision_stage1", *flags)
    assert [report["topology"] for report in reports] == ["H100:8", "H200:8"]
    assert reports[0].keys() >= KEYS
    for report in reports:
        assert (report["compiled"], report["compile_seconds"], report["mfu"]) == (False, None, None)
        assert report["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
        assert report["collective_bytes"] == {"all-reduce": pytest.approx(0.15e9, rel=0.2)}, "of gradients alone"
        assert report["flops_per_chip"] == pytest.approx(56.7e12, rel=0.02)  # 288 ms at 197 TFLOP/s
    cli.main(["compile", "vision_stage1", *map(str, flags), "--mesh.fsdp", "8"])
    assert "Not compiled: XLA compiles for a GPU only where there is one." in capsys.readouterr().out


def test_fsdp_gathers_the_language_model_twice(capsys):
    flags = ["--model", "7b", "--topology", "H100:8", "--rows", 8, "--length", 72, "--mesh.fsdp", 8]
    (report,) = compile_command(capsys, "vision_stage1", *flags)
    llama, encoders = 13.48e9, 2.4e9  # bytes in bfloat16
    assert report["collective_bytes"]["all-gather"] == pytest.approx((2 * llama + encoders) * 7 / 8, rel=0.02)


def test_all_padded_lengths_are_reported(capsys):
    reports = compile_command(capsys, "vision_stage2", "--model", "tiny", "--topology", "H100:8", "--rows", 1)
    assert [report["tokens"] for report in reports] == [48, 72, 128, 192, 256, 384, 512]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vision_stage1", "--model", "tiny", "--topology", "v9:2x2"), "no topology 'v9:2x2': choose one of v5e"),
        (
            ("vision_stage1", "--model", "tiny", "--topology", "v5e:2x2", "--mesh.fsdp", "3"),
            "mesh data=1 fsdp=3 tensor=1 is for 3 chips, and v5e:2x2 has 4",
        ),
        (
            ("vision_stage1", "--model", "tiny", "--topology", "v5e:4x4", "--batch-size", "8"),
            "batch_size 8 is not divisible by the 16 shards",
        ),
        (("vision_stage1", "--topology", "v5e:2x2"), "model: no such model directory; give one with --model"),
        (("8b", "--topology", "v5e:2x2"), "8b: no such model or run config"),
        (("7b", "--topology", "H100:8"), "topology H100:8: prefill and decode are compiled for TPUs only"),
    ],
)
def test_errors_are_one_line(arguments, message):
    with pytest.raises(SystemExit, match=f"^vllama: .*{message}") as stop:
        cli.main(["compile", *arguments])
    assert "\n" not in stop.value.code


def test_a_missing_compiler_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "libtpu" else find(name))
    with pytest.raises(SystemExit, match=r"needs libtpu, which is not installed: pip install 'vllama-jax\[aot\]'"):
        cli.main(["compile", "vision_stage1", "--model", "tiny", "--topology", "v5e:2x2", "--rows", "1"])


def test_require_fit_makes_a_bad_fit_an_error(capsys):
    flags = ["--model", "13b", "--topology", "H100:8", "--rows", "256", "--mesh.fsdp", "1", "--length", "512"]
    with pytest.raises(SystemExit, match="does not fit: train_step of 512 tokens on H100:8"):
        cli.main(["compile", "vision_stage2", *flags, "--require-fit"])
    assert "no" in capsys.readouterr().out
