"""The studies on the miniature: their commands at a small size, and the tables of their pages (docs/studies/)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllama_jax.errors import ConfigError, DataError
from vllama_jax.miniature.evaluate import measure
from vllama_jax.miniature.studies import tables
from vllama_jax.miniature.studies.tables import Setting, Table

PAGES = sorted((Path(__file__).parents[1] / "docs" / "studies").glob("*.md"))
SMALL = ["--seeds", "0", "--clips", "12", "--images", "8", "--steps1", "2", "--steps2", "2", "--files", "4"]
COMMANDS = {"frames_and_queries": ["--frames", "1", "--queries", "2"], "low_rank": ["--ranks", "2"]}
MEASURED = {
    "frames_and_queries": {"frames": ["1 frame"], "queries": ["2 queries"], "frames_at_inference": ["1 frame"]},
    "low_rank": {table: ["frozen", "rank 2", "all weights"] for table in ("low_rank_vision", "low_rank_elsewhere")},
}


def _setting(name: str, *right: int) -> Setting:
    seeds = [{"motion": measure([True] * count + [False] * (10 - count), 0.25)} for count in right]
    return Setting(name, {"media tokens": "16"}, seeds)


def test_a_table_has_the_mean_and_the_range_of_the_seeds_or_the_interval_of_one():
    assert tables.format_table(Table("x", "Frames", [_setting("1 frame", 2, 4, 9), _setting("2 frames", 10)])) == (
        "Frames:\n\n"
        "|  | 1 frame | 2 frames | chance |\n"
        "| --- | --- | --- | --- |\n"
        "| media tokens | 16 | 16 |  |\n"
        "| `motion` | 0.500 (0.200 to 0.900) | 1.000 (0.723 to 1.000) | 0.250 |"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tables_of_a_page_are_those_of_its_results(page):
    text, results = page.read_text("utf-8"), page.with_suffix(".json")
    found = tables.read_tables(results) if results.exists() else []
    assert text.count("| chance |") == len(found)
    for table in found:
        assert tables.format_table(table) in text
        assert f"({table.name}.png)" in text
        assert page.with_name(f"{table.name}.png").exists()


def test_a_file_that_is_not_the_results_of_a_study_is_an_error(tmp_path):
    for content in ('{"measures": {}}', "[]", "{"):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(DataError, match=r"results\.json: (not the results of a study|not JSON|.*object)"):
            tables.read_tables(tmp_path / "results.json")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_study_trains_and_measures_every_setting(name, tmp_path):
    from vllama_jax.miniature.studies import runs

    out, module = tmp_path / "out", f"vllama_jax.miniature.studies.{name}"
    arguments = [sys.executable, "-m", module, str(out), *SMALL, *COMMANDS[name]]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((out / "results.json").read_text())
    assert content["minutes"] > 0
    found = tables.read_tables(out / "results.json")
    assert {table.name: [setting.name for setting in table.settings] for table in found} == MEASURED[name]
    assert all(len(setting.seeds) == 1 for table in found for setting in table.settings)
    assert done.stdout == "\n\n".join(map(tables.format_table, found)) + "\n"
    assert {file.stem for file in out.glob("*.png")} == set(MEASURED[name])

    times = {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*")}
    study = runs.Study(out, (0,), runs.Sizes(files=5), print)
    with pytest.raises(ConfigError, match=r"was started with other settings \(clips was 12, now \d+, "):
        runs.run_study(out, (0,), study.sizes, lambda study: pytest.fail("it was not refused"))
    assert times == {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*")}


@pytest.mark.parametrize("numbers", [(), (1, 1), (0,), (9,)])
def test_numbers_out_of_range_are_an_error(numbers):
    from vllama_jax.miniature.studies.runs import check_numbers

    with pytest.raises(ConfigError, match="--frames must be from 1 to 8, and no number may occur twice, not "):
        check_numbers("--frames", numbers, 1, 8)
    check_numbers("--frames", (1, 8), 1, 8)
