"""benchmarks/serve.py, as a user runs it: a little load, and the chaos with few files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILES = 18  # one of each format, with different mutations
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / "serve.py"), "--json", "--chaos", "--files", str(FILES)]
    command += ["--clients", "1", "4", "--seconds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.stdout, done.stderr
    return json.loads(done.stdout) | {"exit code": done.returncode}


def test_load(figures: dict[str, Any]):
    one, four = figures["levels"]
    assert (one["clients"], four["clients"]) == (1, 4)
    assert four["requests"] >= 4
    assert four["tokens_per_second"] > four["requests_per_second"] > 0
    assert 0 < four["first_token_p50"] <= four["first_token_p99"]
    assert four["offline_ratio"] > 0
    assert four["server_megabytes"] > 100


def test_no_request_is_lost_and_answers_are_those_of_the_offline_engine(figures: dict[str, Any]):
    assert figures["problems"] == []
    assert figures["exit code"] == 0


@pytest.mark.parametrize("part", ["killed-clients", "slow-uploads", "broken-bodies", "hostile-files", "full-disk"])
def test_chaos(figures: dict[str, Any], part: str):
    """A leak, an unready health and another client without its answer are problems, see benchmarks/serve_chaos.py."""
    found = next(one for one in figures["parts"] if one["part"] == part)
    assert found["problems"] == []
    assert found["others"] >= 3
    if part == "hostile-files":
        assert sum(found["outcomes"].values()) == FILES
        assert "200" in found["outcomes"]
    if part == "full-disk":
        assert found["outcomes"] == {"200": 8, "503": 8}
