"""The commands of the miniature report invalid input as `vllama` does: one line on stderr, exit code 1."""

import subprocess
import sys

import pytest

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        pytest.param("miniature", ["{file}"], "{file}: File exists", marks=SLOW),
        pytest.param("miniature.assets", ["{missing}"], "{missing}/results.json: cannot be read", marks=SLOW),
        pytest.param("miniature.figures", ["{missing}", "{missing}"], "{missing}/vision1/metrics.jsonl:", marks=SLOW),
        pytest.param("miniature.long_video", ["--questions", "0"], "--questions must be at least 1", marks=SLOW),
        pytest.param("miniature.studies.low_rank", ["{file}"], "{file}", marks=SLOW),
        ("miniature.studies.tables", ["{missing}"], "{missing}: not the results of a study"),
    ],
)
def test_invalid_input_is_reported_in_one_line(module, arguments, message, tmp_path):
    (tmp_path / "file").touch()
    names = {"file": str(tmp_path / "file"), "missing": str(tmp_path / "missing")}
    command = [sys.executable, "-m", f"vllama_jax.{module}", *(one.format(**names) for one in arguments)]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith(f"vllama: {message.format(**names)}")
    assert process.stderr.count("\n") == 1
    assert not (tmp_path / "missing").exists()
