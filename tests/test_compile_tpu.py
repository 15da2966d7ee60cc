"""`vllama compile` with the TPU compiler, where libtpu is installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tpu_compiler import compiler_environment, needs_libtpu

pytestmark = needs_libtpu


def compile_command(*arguments: object) -> list[dict]:
    command = [str(Path(sys.executable).parent / "vllama"), "compile", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=compiler_environment())
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "the compiler's warnings are not the user's"
    return json.loads(done.stdout)


def test_a_step_is_compiled_for_four_chips():
    """Half a minute on an idle core."""
    flags = ["--model", "tiny", "--topology", "v5litepod-4", "--mesh.fsdp", 4, "--rows", 2, "--length", 48]
    (report,) = compile_command("vision_stage1", *flags)
    assert report["topology"] == "v5e:2x2"
    assert report["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert report["fits"]
    assert report["compiled"]
    assert report["hbm_bytes_per_chip"] == sum(report["hbm_bytes"].values())
    assert report["collective_bytes"]["all-gather"] > 0
    assert report["flops_per_chip"] == pytest.approx(report["model_flops_per_chip"], rel=0.5)
    assert report["schedule_ms"] > report["compute_ms"] > 0
    assert 0 < report["mfu"] < 1


@pytest.mark.slow
def test_prefill_and_decode_are_compiled():
    reports = compile_command("tiny", "--topology", "v5e:2x2", "--batch-size", 2, "--length", 64)
    assert [report["program"] for report in reports] == ["prefill", "decode"]
    prefill, decode = reports
    assert decode["flops_per_chip"] < prefill["flops_per_chip"] / 8
    assert all(report["fits"] and report["step_ms"] > 0 for report in reports)
