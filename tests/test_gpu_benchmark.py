"""benchmarks/gpu.py: what makes it fail, errors in a section, and a run of all sections without a GPU."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest

from vllama_jax.io.jsonl import JsonLinesFile
from vllama_jax.nn.attention import attend_with_einsum

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.fixture
def sections(gpu: ModuleType) -> ModuleType:
    import gpu_sections

    return gpu_sections


def run_cases(sections: ModuleType, path: Path, cases: dict[str, Callable], seconds: int) -> list[dict]:
    sections.SECTIONS["cases"] = lambda size: iter(cases.items())
    sections.main("cases", "tiny", str(seconds), str(path))
    return JsonLinesFile(path).read()


def raise_error() -> None:
    raise ValueError("first line\nsecond line")


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"figures": {"error": 0.1, "bound": 0.1, "ms": None}}, ""),
        ({"figures": {"float32_error": 0.2, "float32_bound": 0.1}}, "float32 error above the bound"),
        ({"figures": {"error": math.nan, "bound": 0.1}}, "error above the bound"),
        ({"failed": "exit code 1: no GPU"}, "exit code 1: no GPU"),
        ({"skipped": "no time left"}, ""),
    ],
)
def test_problems_of_records(gpu: ModuleType, record: dict, problem: str):
    assert gpu.find_problem(record) == problem
    line = gpu.format_record({"section": "parity", "case": "vit", **record})
    assert ("FAILED" in line) == bool(problem)


def test_figures_are_printed_with_bounds_and_what_is_not_measured(gpu: ModuleType):
    figures = {"error": 0.001234567, "bound": 0.01, "implementation": "cuDNN", "einsum_ms": None, "mfu": None}
    line = gpu.format_record({"section": "attention", "case": "vit", "figures": figures})
    assert line == ("attention: vit: error 0.001235 (bound 0.01); implementation cuDNN; not measured: einsum ms, mfu")


def test_sections_are_those_of_the_other_file(gpu: ModuleType, sections: ModuleType):
    assert tuple(sections.SECTIONS) == gpu.SECTIONS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "seconds", "message"),
    [
        ("print('out of memory', file=sys.stderr, flush=True); os.abort()", 60, "exit code -6: out of memory"),
        ("time.sleep(60)", 3, "stopped after 3 s: no output"),
    ],
)
def test_a_section_that_ends_early_keeps_its_records(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str, seconds: int, message: str
):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        'open(sys.argv[4], "w").write(\'{"section": "decode", "case": "one"}\\n{"section"\')\n' + end
    )
    monkeypatch.setattr(gpu, "SCRIPT", script)
    first, last = gpu.run_section("decode", "tiny", seconds)
    assert first == {"section": "decode", "case": "one"}
    assert last["failed"] == message


def test_an_error_in_a_case_is_one_line_and_others_run(sections: ModuleType, tmp_path: Path):
    failed, measured = run_cases(sections, tmp_path / "f", {"one": raise_error, "two": lambda: {"ms": 1.0}}, 1000)
    assert failed["failed"] == "first line second line"
    assert "raise_error" in failed["traceback"]
    assert measured == {"section": "cases", "case": "two", "figures": {"ms": 1.0}}


def test_no_case_starts_without_time(sections: ModuleType, tmp_path: Path):
    records = run_cases(sections, tmp_path / "f", {"one": raise_error, "two": raise_error}, sections.CASE_SECONDS - 1)
    assert [record["skipped"] for record in records] == ["no time left"] * 2


def test_a_machine_without_a_gpu_is_refused_at_full_size(sections: ModuleType):
    ((_, measure),) = sections.describe_device(sections.SIZES["full"])
    with pytest.raises(RuntimeError, match="no GPU: JAX found cpu; try the script with --size tiny"):
        measure()


@pytest.mark.slow
def test_attention_without_the_extra_key_exceeds_its_bound(
    gpu: ModuleType, sections: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    shape = (2, 9, 3, 4, 8)
    assert not gpu.find_problem({"figures": sections.compare_attention_of(shape, extra=True)})
    monkeypatch.setattr(sections, "self_attend", lambda qkv, extra: attend_with_einsum(qkv, None))
    assert gpu.find_problem({"figures": sections.compare_attention_of(shape, extra=True)}) == "error above the bound"


def test_outputs_that_are_not_finite_are_an_error(sections: ModuleType):
    assert sections.relative_error(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1)
    with pytest.raises(ArithmeticError, match="not finite"):
        sections.relative_error(np.array([math.inf]), np.array([1.0]))


def test_large_weights_are_independent(sections: ModuleType):
    import random_weights

    drawn = random_weights.draw_large(1, (3, 512, 700), jnp.dtype("bfloat16"))
    assert drawn.dtype == jnp.bfloat16
    layers = np.asarray(drawn, np.float32)
    assert layers.std() == pytest.approx(0.02, rel=0.01)
    other = np.asarray(random_weights.draw_large(2, (512, 700), jnp.dtype("float32")))
    rows = np.stack([*layers, np.roll(layers[0], 1, 0), np.roll(layers[0], 1, 1), other]).reshape(6, -1)
    correlations = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlations).max() < 0.01
    singular = np.linalg.svd(layers[0], compute_uv=False)
    assert singular.max() < 1.05 * 0.02 * (512**0.5 + 700**0.5), "random matrices have no larger ones"


@pytest.mark.slow
def test_all_sections_run_on_a_cpu(gpu: ModuleType, sections: ModuleType, tmp_path: Path):
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--size", "tiny", "--seconds", "3600", "--json", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(file.read_text())["records"]
    assert tuple(dict.fromkeys(record["section"] for record in records)) == gpu.SECTIONS
    assert all("figures" in record for record in records), "nothing failed and nothing was skipped"
    assert len(done.stdout.splitlines()) == len(records) + 1
    towers = {record["case"].split()[0]: record["figures"] for record in records if record["section"] == "parity"}
    assert {*towers} == {
        *("vit", "imagebind/vision", "imagebind/audio", "llama"),
        *("image_qformer", "video_qformer", "audio_qformer"),
    }
    for figures in towers.values():
        assert figures["float32_error"] <= figures["float32_bound"]
        assert 0 < figures["bfloat16_error"] <= figures["bfloat16_bound"]
    by_section = {record["section"]: record["figures"] for record in records}
    assert all(by_section[name][figure] is None for name, figure in GPU_FIGURES)
    assert "not measured" in done.stdout


GPU_FIGURES = [
    *[("attention", name) for name in ("ms", "einsum_ms", "einsum_time_ratio")],
    *[("train_step", name) for name in ("seconds", "mfu", "peak_gigabytes", "compiled_gigabytes")],
    *[("encode", name) for name in ("ms", "per_second", "mfu_of_encoders")],
    *[("decode", name) for name in ("ms_per_token", "tokens_per_second", "over_floor")],
]
