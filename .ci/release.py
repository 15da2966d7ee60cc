"""Check and build a release, and upload it with --upload: python .ci/release.py VERSION [--upload].

The package is built from a clone of the commit, so that files that are not in git cannot get into it.
"""

import argparse
import configparser
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SECTION = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>\S+))?\n(?P<text>.*?)(?=^## |\Z)", re.M | re.S)
DATE = re.compile(r"\d{4}-\d\d-\d\d")


def run(*command: str, folder: Path) -> str:
    """Run a command, and return its output. Exit with a line if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"release: {' '.join(command)}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
    return done.stdout.strip()


def list_problems(repository: Path, version: str) -> list[str]:
    """Return what keeps the commit from being released: a line for each problem."""
    problems = []
    if run("git", "status", "--porcelain", folder=repository):
        problems.append("the working tree has changes; commit or stash them")
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(repository / "setup.cfg", encoding="utf-8")
    if (found := settings["metadata"]["version"]) != version:
        problems.append(f"setup.cfg: version is {found}, not {version}")
    if f"\nversion: {version}\n" not in (repository / "CITATION.cff").read_text("utf-8"):
        problems.append(f"CITATION.cff: version is not {version}")
    if tagged_commit(repository, version) not in ("", head(repository)):
        problems.append(f"tag v{version} is on another commit; choose a new version")
    sections = {found["version"]: found for found in SECTION.finditer((repository / "CHANGELOG.md").read_text("utf-8"))}
    section = sections.get(version)
    if section is None or not DATE.fullmatch(section["date"] or "") or not section["text"].strip():
        problems.append(f"CHANGELOG.md: no section `## [{version}] - YYYY-MM-DD` with text")
    unreleased = sections.get("Unreleased")
    if unreleased is not None and unreleased["text"].strip():
        problems.append(f"CHANGELOG.md: the section Unreleased has text; move it to {version}")
    return problems


def tagged_commit(repository: Path, version: str) -> str:
    """Return the hash of the commit with the tag of a version; "" if there is no such tag."""
    exists = run("git", "tag", "--list", f"v{version}", folder=repository)
    return run("git", "rev-list", "-n", "1", f"v{version}", folder=repository) if exists else ""


def head(repository: Path) -> str:
    """Return the hash of the commit that is checked out."""
    return run("git", "rev-parse", "HEAD", folder=repository)


def build(repository: Path) -> list[Path]:
    """Build the wheel and the sdist into dist/, and check their metadata."""
    out = repository / "dist"
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "checkout")
        run("git", "clone", "--quiet", "--no-hardlinks", str(repository), str(clone), folder=repository)
        run("git", "checkout", "--quiet", head(repository), folder=clone)
        run(sys.executable, "-m", "build", "--outdir", str(out), ".", folder=clone)
    files = sorted(out.iterdir())
    run(sys.executable, "-m", "twine", "check", "--strict", *map(str, files), folder=repository)
    return files


def main() -> None:
    """Check, build, and print the commands that publish the release, or upload it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("version", help="as in setup.cfg, for example 0.1.0")
    parser.add_argument("--skip-checks", action="store_true", help="do not run .ci/run: it has passed on this commit")
    parser.add_argument("--upload", action="store_true", help="upload to PyPI with twine; needs the tag on this commit")
    options = parser.parse_args()
    repository, tag = Path(__file__).resolve().parents[1], f"v{options.version}"
    problems = list_problems(repository, options.version)
    if options.upload and not tagged_commit(repository, options.version):
        problems.append(f"--upload needs the tag {tag}: git tag -a {tag} -m {tag}")
    if problems:
        sys.exit("\n".join(f"release: {problem}" for problem in problems))
    if not options.skip_checks and subprocess.run([repository / ".ci/run"], check=False).returncode:
        sys.exit("release: .ci/run failed; nothing was built")
    files = [str(file.relative_to(repository)) for file in build(repository)]
    for file in files:
        print(f"{file}: {(repository / file).stat().st_size:,} bytes")
    if options.upload:
        command = [sys.executable, "-m", "twine", "upload", *files]
        sys.exit(subprocess.run(command, cwd=repository, check=False).returncode)
    print(f"the workflow release.yml publishes it:\n  git tag -a {tag} -m {tag} && git push origin {tag}")
    print(f"or by hand, after the tag:\n  python .ci/release.py {options.version} --skip-checks --upload")


if __name__ == "__main__":
    main()
