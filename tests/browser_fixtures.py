"""A headless browser. Needs `chromium` and the package `playwright`; `.ci/run` has both."""

import os
import shutil

import pytest

FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def browser():
    chromium = os.environ.get("VLLAMA_CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium and playwright: apt-get install chromium; pip install playwright")
    if "VLLAMA_CHROMIUM" not in os.environ:
        pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as runner:
        yield runner.chromium.launch(executable_path=chromium, args=FLAGS)
