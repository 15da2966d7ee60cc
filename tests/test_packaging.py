"""The package on a package index, and with a Python that is too old for it."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import vllama_jax

CHECKOUT = Path(__file__).parents[1]
START = ("__init__.py", "__main__.py")  # the files that an older Python reads first


@pytest.fixture(scope="module")
def description():
    return runpy.run_path(str(CHECKOUT / "setup.py"))["description"]


LINKS = (
    "# A\n\nSee [how](docs/a.md#b), [where](https://x.org/y) and [here](#c); [b.md](b.md).\n\n![drawn](docs/a.png)\n"
)


def test_links_to_files_lead_to_the_repository_where_its_url_is_known(description):
    assert description(LINKS, "https://example.org/us/it/") == (
        "# A\n\nSee [how](https://example.org/us/it/blob/main/docs/a.md#b), [where](https://x.org/y) and "
        "[here](#c); [b.md](https://example.org/us/it/blob/main/b.md).\n\n"
        "![drawn](https://example.org/us/it/raw/main/docs/a.png)\n"
    )


def test_links_to_files_are_text_where_it_is_not(description):
    assert description(LINKS, "") == (
        "# A\n\nFiles that are named here are in the source distribution.\n\n"
        "See how (`docs/a.md`), [where](https://x.org/y) and [here](#c); `b.md`.\n\ndrawn (`docs/a.png`)\n"
    )


@pytest.mark.parametrize("source", ["", "https://example.org/us/it"])
def test_no_relative_link_of_the_readme_is_left(description, source):
    readme = (CHECKOUT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]*)\)", readme)
    relative = [link for link in links if not link.startswith(("http", "#"))]
    assert relative
    assert all((CHECKOUT / link.partition("#")[0]).exists() for link in relative)
    found = re.findall(r"\]\(([^)]*)\)", description(readme, source))
    assert all(link.startswith(("http", "#")) for link in found)
    assert len(found) == len(links) - (0 if source else len(relative))


@pytest.mark.parametrize("name", START)
def test_an_old_python_can_parse_what_it_reads_first(name):
    source = (CHECKOUT / "vllama_jax" / name).read_text()
    ast.parse(source, feature_version=(3, 8))


def test_an_old_python_is_told_which_one_is_needed(monkeypatch):
    source = compile(Path(vllama_jax.__file__).read_text(), "vllama_jax", "exec")
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    with pytest.raises(ImportError) as refused:
        exec(source, {"__name__": "vllama_jax"})
    assert str(refused.value) == "vllama_jax needs Python 3.11 or newer; this is Python 3.10"


@pytest.mark.parametrize("version", ["3.8", "3.10"])
def test_a_real_old_python_says_so_in_one_line(version):
    python = f"python{version}"
    try:
        subprocess.run([python, "-c", ""], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"{python} is not installed")
    done = subprocess.run([python, "-m", "vllama_jax"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"(ImportError: vllama_jax needs Python 3.11 or newer; this is Python {version})" in done.stderr
    assert done.stderr.count("\n") == 1
