"""The release script, the workflows and the templates of issues."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RELEASE = ROOT / ".ci/release.py"
if not RELEASE.exists():
    pytest.skip("the sdist has no .ci", allow_module_level=True)


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository whose version 1.2.0 can be released."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "setup.cfg").write_text("[metadata]\nversion = 1.2.0\n")
    (tmp_path / "CITATION.cff").write_text("title: a\nversion: 1.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2027-01-02\n\n- It chats.\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def test_what_keeps_a_commit_from_being_released(repository):
    list_problems = runpy.run_path(str(RELEASE))["list_problems"]
    assert list_problems(repository, "1.2.0") == []
    git(repository, "tag", "v1.2.0")
    assert list_problems(repository, "1.2.0") == []
    assert list_problems(repository, "1.3.0") == [
        "setup.cfg: version is 1.2.0, not 1.3.0",
        "CITATION.cff: version is not 1.3.0",
        "CHANGELOG.md: no section `## [1.3.0] - YYYY-MM-DD` with text",
    ]
    (repository / "CHANGELOG.md").write_text("## [Unreleased]\n\n- New.\n\n## [1.2.0] - unreleased\n\n- It chats.\n")
    git(repository, "commit", "--all", "--quiet", "--message", "second")
    (repository / "notes.txt").touch()
    assert list_problems(repository, "1.2.0") == [
        "the working tree has changes; commit or stash them",
        "tag v1.2.0 is on another commit; choose a new version",
        "CHANGELOG.md: no section `## [1.2.0] - YYYY-MM-DD` with text",
        "CHANGELOG.md: the section Unreleased has text; move it to 1.2.0",
    ]


def test_the_script_exits_with_the_problems():
    done = subprocess.run(
        [sys.executable, RELEASE, "99.0.0", "--upload"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1
    assert "release: CITATION.cff: version is not 99.0.0\n" in done.stderr
    assert done.stderr.endswith("release: --upload needs the tag v99.0.0: git tag -a v99.0.0 -m v99.0.0\n")


def test_the_changelog_and_the_script_agree_on_the_format():
    sections = list(runpy.run_path(str(RELEASE))["SECTION"].finditer((ROOT / "CHANGELOG.md").read_text("utf-8")))
    assert sections[0]["version"] == "Unreleased"
    kinds = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_workflows_run_what_exists_on_supported_pythons():
    workflows = {file.name: yaml.safe_load(file.read_text()) for file in (ROOT / ".github/workflows").glob("*.yml")}
    assert workflows.keys() == {"checks.yml", "links.yml", "release.yml"}
    pythons = workflows["checks.yml"]["jobs"]["checks"]["strategy"]["matrix"]["python"]
    assert all(
        f"Programming Language :: Python :: {version}" in (ROOT / "setup.cfg").read_text() for version in pythons
    )
    steps = [step for one in workflows.values() for job in one["jobs"].values() for step in job.get("steps", ())]
    scripts = {name for step in steps for name in re.findall(r"\.ci/\w+(?:\.py)?", step.get("run", ""))}
    assert scripts == {".ci/run", ".ci/release.py"}
    assert all((ROOT / name).exists() for name in scripts)
    permissions = {name: one["permissions"] for name, one in workflows.items()}
    assert set(map(str, permissions.values())) == {"{'contents': 'read'}"}


def test_templates_of_issues_ask_for_the_report_of_a_command_that_exists():
    from vllama_jax.cli import COMMANDS

    forms = [yaml.safe_load(file.read_text()) for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")]
    text = str(forms)
    assert "vllama env" in text
    assert set(re.findall(r"`vllama (\w+)", text)) <= COMMANDS.keys()
