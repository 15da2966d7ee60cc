"""The notebooks of examples/notebooks: the stored outputs are clean, and every cell runs."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/-])/(?:tmp|root|home|work|usr|opt|mnt|content|Users)/")
MAX_BYTES = 3_000_000  # of all notebooks
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")  # the relative path in [text](path#place)


def read_cells(path: Path, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def texts(cell: dict) -> str:
    """The outputs of a cell that are read as text."""
    return "\n".join(joined(one.get("text", one.get("data", {}).get("text/plain", ""))) for one in cell["outputs"])


@pytest.fixture(scope="module")
def ci_notebooks():
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / ".ci/notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_notebooks_and_they_are_small():
    assert NAMES == ["convert_and_verify", "miniature", "own_clips", "what_a_qformer_reads"]
    assert sum(path.stat().st_size for path in NOTEBOOKS) < MAX_BYTES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_stored_outputs_are_those_of_one_run_without_errors(path):
    cells = read_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), (
        f"run: python .ci/notebooks.py {path.stem}"
    )
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs) or path.stem == "convert_and_verify"
    assert [output for output in outputs if output["output_type"] == "error"] == []
    for cell in cells:
        text = texts(cell)
        assert not re.search("warning|traceback|\x1b", text, re.IGNORECASE), text
        assert not ABSOLUTE_PATH.search(text), text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_the_first_cell_installs_only_where_the_package_is_missing(path):
    source = joined(read_cells(path)[0]["source"])
    assert 'if importlib.util.find_spec("vllama_jax") is None:' in source
    assert re.search(r"^    %pip install --quiet '?vllama-jax(\[verify\])?'?$", source, re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_links_lead_somewhere(path):
    links = LINK.findall("\n".join(joined(cell["source"]) for cell in read_cells(path, "markdown")))
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_every_cell_runs(path, ci_notebooks):
    notebook = ci_notebooks.execute(path)
    assert ci_notebooks.list_warnings(notebook) == []
    text = "\n".join(texts(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert EXPECTED[path.stem].search(text), text


# What the text of a notebook promises, with the model of the package, whatever its exact figures.
EXPECTED = {
    "convert_and_verify": re.compile(r"arrays, bit-equal: True"),
    "miniature": re.compile(r"as filmed  it moves to the left\nreversed   it moves to the right\n"),
    "own_clips": re.compile(r"\bbefore +\{.*'both': 0\}.*\n.*\bafter +\{.*'both': (?:[345]\d|60)\}"),
    "what_a_qformer_reads": re.compile(r"a guitar\n"),
}
