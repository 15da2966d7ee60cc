"""Mutated media files: a one-line error or a valid result, within limits of time and memory. See fuzz_media.py."""

import json
import subprocess
import sys
from pathlib import Path

import fuzz_media
import pytest

MEMORY = 1.2e9  # bytes for each file
LENGTHS = {"gif": 0.8, "apng": 0.8} | dict.fromkeys(fuzz_media.IMAGES, 0.0)  # seconds; others: fuzz_media.SECONDS


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """The outcomes of 300 files, 14 of them unchanged."""
    out = tmp_path_factory.mktemp("fuzz") / "results.jsonl"
    subprocess.run([sys.executable, Path(fuzz_media.__file__), out], check=True, timeout=1800)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found) == 300
    return found


def length(result: dict) -> float:
    return LENGTHS.get(result["original"].removeprefix("a."), fuzz_media.SECONDS)


@pytest.mark.slow
def test_every_file_is_read_or_refused_in_one_line(results):
    assert [result for result in results if result["outcome"] not in ("accepted", "refused")] == []
    assert min(sum(result["outcome"] == outcome for result in results) for outcome in ("accepted", "refused")) >= 50


@pytest.mark.slow
def test_decoding_time_and_memory_are_bounded(results):
    assert [result for result in results if result["cpu"] > fuzz_media.CPU_SECONDS or result["bytes"] > MEMORY] == []


@pytest.mark.slow
def test_unchanged_files_keep_their_length(results):
    unchanged = [result for result in results if result["mutation"] == "keep"]
    assert len(unchanged) >= 14
    for result in unchanged:
        assert (result["outcome"], result["notes"]) == ("accepted", [])
        assert result["seconds"] == pytest.approx(length(result), abs=0.15)


@pytest.mark.slow
def test_truncated_files_are_never_silently_shorter(results):
    """They are refused, or a note or the audio report says that something is missing."""
    truncated = [result for result in results if result["mutation"] == "truncate"]
    assert len(truncated) >= 20
    for result in truncated:
        if result["outcome"] == "accepted" and not result["notes"] and "truncated" not in result["audio"]:
            assert result["seconds"] >= length(result) - 0.1, result
