"""The scripts of benchmarks/compare.py: all areas at tiny size, and the tables and plots of their figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {
    "language.py": {"prefill", "decoding"},
    "encoders.py": {"encoders"},
    "answers.py": {"answers"},
    "media.py": {"media"},
}
RUN_ALL = "import runpy, sys\nfor script in sys.argv.pop(1).split(): runpy.run_path(script, run_name='__main__')"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the scripts in one process, so that torch is imported once."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("results")
    scripts = " ".join(str(BENCHMARKS / script) for script in SCRIPTS)
    arguments = ["--size", "tiny", "--rounds", "1", "--out", str(folder)]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{BENCHMARKS}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-c", RUN_ALL, scripts, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_all_areas_are_measured_and_shown(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compare

    areas = {file.stem: json.loads(file.read_text()) for file in results.glob("*.json")}
    assert set(areas) == set.union(*SCRIPTS.values())
    for area in areas.values():
        assert area["machine"]["threads"] >= 1
        assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in area["rows"])
    page = tmp_path / "README.md"
    page.write_text("".join(f"before\n<!-- {area} -->\nold\n<!-- end of {area} -->\n" for area in compare.AREAS))
    compare.write_tables(results, page)
    text = page.read_text()
    assert "old" not in text
    assert text.count("before") == len(compare.AREAS)
    for name, area in areas.items():
        assert all(f"| {row['name']} |" in text for row in area["rows"])
        assert (results / f"{name}.svg").stat().st_size > 1000


def test_the_ratio_is_the_median_of_the_rounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import timing

    ours, slow, fast = iter([9.0, 1.0, 2.0, 6.0]), iter([50.0] * 9), iter([9.0, 4.0, 9.0, 2.0, 1.0, 2.0])
    row = timing.compare("row", lambda: next(ours), {"slow": lambda: next(slow), "fast": lambda: next(fast)}, 3)
    assert (row["seconds"], row["other"], row["other_seconds"], row["ratio"]) == (2.0, "fast", 2.0, 2.0)


def test_a_page_without_markers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compare

    page = tmp_path / "README.md"
    page.write_text("text\n")
    with pytest.raises(SystemExit, match="no markers of encoders"):
        compare.write_tables(tmp_path, page)
    assert page.read_text() == "text\n"
