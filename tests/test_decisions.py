"""docs/decisions.md: unique numbers, references to existing entries, names of existing files."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/decisions.md").read_text("utf-8")
NUMBERS = re.findall(r"^- \*\*(D-\d{3}) ", PAGE, re.MULTILINE)


def test_each_entry_has_a_number_of_its_own_and_a_date():
    assert len(NUMBERS) == PAGE.count("\n- "), "an entry has no number"
    assert [number for number, count in Counter(NUMBERS).items() if count > 1] == []
    entries = re.split(r"\n(?=- |## )", PAGE)
    dated = re.compile(r"\(\d{4}-\d\d-\d\d\)\n*\Z")
    assert [one[:40] for one in entries if one.startswith("- ") and not dated.search(one)] == []


def test_references_are_to_entries():
    folders = (ROOT / name for name in ("docs", "vllama_jax", "convert", "examples", "benchmarks", "configs"))
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".md")]
    files += [ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    named = {(file.name, number) for file in files for number in re.findall(r"D-\d{3}\b", file.read_text("utf-8"))}
    assert [reference for reference in sorted(named) if reference[1] not in NUMBERS] == []


def test_files_that_entries_name_exist():
    names = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|cfg))`", PAGE))
    assert names, "no file is named any more"
    assert [name for name in sorted(names) if not any((ROOT / at / name).exists() for at in ("", "vllama_jax"))] == []
