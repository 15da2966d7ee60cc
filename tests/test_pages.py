"""The pages: links and anchors resolve on GitHub, CI runs the blocks that look so, and commands have their options."""

import contextlib
import functools
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllama_jax import cli

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("docs/studies/*.md")),
    *sorted(ROOT.glob("examples/serving/*.md")),
]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\((?!\w+:)([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
HELP_OF = {  # where the options of a command depend on its first argument
    "train": [["train", "vision_stage1"]],
    "features": [["features", "vision_stage1"]],
    "memory": [["memory", "7b"], ["memory", "vision_stage1"]],
    "compile": [["compile", "7b"], ["compile", "vision_stage1"]],
    "data": [["data", "build"], ["data", "check"], ["data", "stats"]],
    "eval": [["eval", "jsonl"], ["eval", "miniature"]],
}


def without_code(text: str) -> str:
    return BLOCK.sub("", text)


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    names = set()
    for heading in HEADING.findall(without_code(page.read_text("utf-8"))):
        plain = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.add(slug if slug not in found else f"{slug}-{found[slug]}")
        found[slug] = found.get(slug, 0) + 1
    return names


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(INLINE_CODE.sub("", without_code(page.read_text("utf-8")))):
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (place and target.suffix == ".md" and place not in anchors(target)):
            yield f"{page.relative_to(ROOT)}: {link}"


def test_relative_links_and_anchors_resolve_on_github():
    assert [link for page in PAGES for link in broken_links(page)] == []
    names = re.findall(r"docs/[\w/]+\.md", "".join(file.read_text("utf-8") for file in ROOT.glob("vllama_jax/**/*.py")))
    assert [name for name in set(names) if not (ROOT / name).exists()] == [], "named in a message or a docstring"


def executed_pages() -> set[Path]:
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci/readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {ROOT / name for name in module.PAGES}


def test_only_blocks_that_ci_runs_are_marked_as_bash_or_python():
    executed = executed_pages()
    assert executed <= set(PAGES)
    blocks = [(page, *block) for page in PAGES for block in BLOCK.findall(page.read_text("utf-8"))]
    marked = [(page, indent) for page, indent, language, _ in blocks if language in ("bash", "python")]
    assert {page for page, _ in marked} == executed, "sh and py are for what CI does not run"
    assert [page for page, indent in marked if indent] == [], ".ci/readme.py does not run blocks that are indented"


def written_options() -> Iterator[tuple[str, str, str]]:
    """The command and each option of `vllama COMMAND … --option` in the blocks and the inline code of all pages."""
    for page in PAGES:
        text = page.read_text("utf-8")
        blocks = [code for _, language, code in BLOCK.findall(text) if language in ("", "sh", "bash", "slurm", "yaml")]
        for line in "\n".join([*blocks, *INLINE_CODE.findall(without_code(text))]).replace("\\\n", " ").splitlines():
            for name, arguments in re.findall(r"(?:^|[ (])vllama ([a-z]+)([^|;&#]*)", line):
                for option in re.findall(r"(?<= )--[a-z][\w.-]*", arguments):
                    yield page.name, name, option


@functools.cache
def options_of(name: str) -> set[str]:
    found = set()
    for words in HELP_OF.get(name, [[name]]):
        out = io.StringIO()
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
            cli.main([*words, "--help"])
        found |= set(re.findall(r"│ +(--[\w.-]+)", out.getvalue()))
    return found


@pytest.mark.slow
def test_commands_and_options_exist(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    written = list(written_options())
    assert len(written) > 300
    assert {name for _, name, _ in written} <= set(cli.COMMANDS)
    assert [one for one in written if one[2] not in options_of(one[1]) | {"--help"}] == []
