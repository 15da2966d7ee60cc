"""mypy checks a user's code outside of the checkout against the installed package."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy comes with the extra 'test'")


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Check a file in a separate folder, where only the installed package is found. All checks share one cache."""
    folder = tmp_path_factory.mktemp("user")

    def run(source: str) -> subprocess.CompletedProcess[str]:
        (folder / "user.py").write_text(source)
        return subprocess.run([sys.executable, "-m", "mypy", "user.py"], cwd=folder, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_public_names_have_their_annotated_types(check):
    found = check(Path(__file__).with_name("public_types.py").read_text())
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
def test_a_wrong_argument_is_an_error_in_the_users_file(check):
    found = check("import vllama_jax as vl\n\nvl.media.read_video(3)\n")
    assert 'user.py:3: error: Argument 1 to "read_video"' in found.stdout
