"""Golden values computed by the original code, found beside the checkout or through VLLAMA_SHARED."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data: VLLAMA_SHARED, else the nearest `shared` in or above the checkout."""
    named = os.environ.get("VLLAMA_SHARED")
    candidates = [Path(named)] if named else [parent / "shared" for parent in Path(__file__).resolve().parents[1:]]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    return pytest.skip("golden data not here: set VLLAMA_SHARED")


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    return shared / "golden"
