"""The page of the server, in a headless browser (`browser_fixtures`)."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serve_fixtures import RunningServer, run_server

import vllama_jax as vl
from vllama_jax.checkpoints.shipped import CLIPS, shipped_model
from vllama_jax.serve.answer_attention import split_text
from vllama_jax.serve.page_routes import EXAMPLES, PAGE
from vllama_jax.text.tokenizer import load_tokenizer

MAX_BYTES = 200_000
SECONDS = 60_000  # ms; the server compiles what it has not run yet


def test_the_page_is_small_and_loads_nothing_from_elsewhere():
    files = [file for file in PAGE.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < MAX_BYTES
    names = {file.name for file in files}
    for file in files:
        text = file.read_text()
        assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+/", text), file.name
        referenced = re.findall(r'(?:href|src)="([^"#:]+)"', text) + re.findall(r'from "\./([^"]+)"', text)
        assert names.issuperset(referenced), file.name
    assert all((CLIPS / file).is_file() for file, *_ in EXAMPLES)


@pytest.mark.parametrize("text", ["a large red horn", "ein Frosch 🐸, é"])
def test_tokens_have_the_text_that_they_add(text):
    tokenizer = load_tokenizer(shipped_model() / "tokenizer")
    ids = np.array(tokenizer.encode(text))
    texts = split_text(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with run_server(vl.load("miniature")) as running:
        yield running


@pytest.fixture
def page(browser, server):
    """The page in a new tab, which may not report an error."""
    errors = []
    tab = browser.new_page()
    tab.set_default_timeout(SECONDS)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(server.url)
    tab.locator("#status", has_text="Ready.").wait_for()
    yield tab
    tab.close()
    assert not errors


def ask(page, question: str) -> str:
    """Type a question, press Enter, and return the answer."""
    answers = page.locator(".answer .actions").count()
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.locator(".answer .actions").nth(answers).wait_for()
    return page.locator(".answer p").nth(answers).inner_text()


def add_file(page, *files: Path) -> None:
    """Choose files, and wait until the page shows what the model takes of them."""
    before = page.locator("#attachments .strip").count()
    page.set_input_files("#files", files)
    page.locator("#attachments .strip").nth(before).wait_for()


def expected_answers(file: Path, *questions: str) -> list[str]:
    """Return the answers of a chat."""
    chat = vl.Chat(vl.load("miniature"))
    chat.add(file)
    return ["".join(chat.ask(question, max_new_tokens=64)) for question in questions]


@pytest.mark.slow
def test_an_example_is_answered_and_shows_what_was_read(page):
    page.locator("#examples button").nth(1).click()
    page.locator(".answer .actions").wait_for()
    assert page.locator(".answer p").inner_text() == "first a large blue frog, then a large red horn"
    assert page.locator(".question .frames figure").count() == 8
    assert page.locator(".question .sounds figure").count() == 8
    page.get_by_role("button", name="Show what was read").click()
    page.locator(".tokens").wait_for()
    largest = []
    for word in ("frog", "horn"):
        page.locator('[role="option"]', has_text=word).click()
        shares = page.locator(".frames .share").evaluate_all("bars => bars.map(bar => parseInt(bar.title))")
        largest.append(shares.index(max(shares)))
    assert largest[0] < 4 <= largest[1]  # the frog is in the first four frames
    page.keyboard.press("ArrowLeft")
    assert page.locator('[aria-selected="true"]').inner_text().strip() == "red"
    assert "“red” reads two.mp4: mostly frame" in page.locator("#status").inner_text()


@pytest.mark.slow
def test_an_uploaded_file_is_answered_as_in_a_chat_also_in_a_second_turn(page):
    add_file(page, CLIPS / "bell.mp4")
    assert page.locator("#attachments").inner_text().startswith("bell.mp4")
    questions = "Which way does it go?", "What do you hear?"
    assert [ask(page, question) for question in questions] == expected_answers(CLIPS / "bell.mp4", *questions)
    page.get_by_role("button", name="New conversation").click()
    assert not page.locator("#conversation li").count()
    assert page.locator("#welcome").is_visible()


@pytest.mark.slow
def test_settings_apply_to_all_files(page):
    add_file(page, CLIPS / "bell.mp4")
    page.get_by_role("button", name="Settings").click()
    page.fill('[name="num_frames"]', "4")
    page.uncheck('[name="audio"]')
    page.get_by_role("button", name="Close").click()
    page.locator("#attachments .frames figure").nth(4).wait_for(state="detached")
    assert page.locator("#attachments .frames figure").count() == 4
    assert not page.locator("#attachments .sounds").count()
    assert "audio off" in page.locator("#attachments").inner_text()


@pytest.mark.slow
def test_an_answer_is_stopped(page, server, monkeypatch):
    engine, step = server.service.scheduler._engine, server.service.scheduler._engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(1) or step())
    page.fill("#question", "Describe it.")
    page.press("#question", "Enter")
    page.get_by_role("button", name="Stop").click()
    assert page.locator(".answer .actions").inner_text().endswith("stopped")
    monkeypatch.undo()
    deadline = time.monotonic() + 30
    while server.service.limits.used("answers"):
        assert time.monotonic() < deadline, "the answer is still decoded"
        time.sleep(0.1)


@pytest.mark.slow
def test_errors_are_shown_and_nothing_is_lost(page, tmp_path):
    (tmp_path / "notes.mp4").write_text("no video")
    page.set_input_files("#files", tmp_path / "notes.mp4")
    page.locator("#problem").wait_for()
    assert page.locator("#problem").inner_text().startswith("notes.mp4: ")
    add_file(page, CLIPS / "birds.jpg")
    page.fill("#question", "word " * 2000)
    page.press("#question", "Enter")
    page.locator("#problem", has_text="tokens").wait_for()
    assert page.locator("#question").input_value().startswith("word")
    assert page.locator("#attachments .file").count() == 1
    page.get_by_role("button", name="Remove birds.jpg").click()
    assert not page.locator("#attachments .file").count()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["camera", "microphone"])
def test_a_recording_is_added(page, kind):
    page.click(f"#record-{kind}")
    page.locator("#elapsed", has_text=re.compile("[1-9] s")).wait_for()
    page.get_by_role("button", name="Use recording").click()
    page.locator("#attachments .sounds").wait_for()
    assert page.locator("#attachments .frames").count() == (kind == "camera")
    assert "audio used" in page.locator("#attachments").inner_text()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_has_no_horizontal_scroll_bar(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    add_file(page, CLIPS / "two.mp4")
    ask(page, "Describe it.")
    add_file(page, CLIPS / "bell.mp4")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    remove = page.get_by_role("button", name="Remove bell.mp4").bounding_box()
    assert remove["x"] + remove["width"] <= 360


@pytest.mark.slow
def test_a_key_is_asked_for(browser):
    with run_server(vl.load("miniature"), keys=("secret",)) as server:
        page = browser.new_page()
        page.set_default_timeout(SECONDS)
        page.goto(server.url)
        page.locator("#problem", has_text="API key").wait_for()
        page.get_by_role("button", name="Settings").click()
        page.fill('[name="key"]', "secret")
        page.get_by_role("button", name="Close").click()
        page.locator("#examples button").first.wait_for()
        add_file(page, CLIPS / "bell.mp4")
        assert ask(page, "What do you hear?") == expected_answers(CLIPS / "bell.mp4", "What do you hear?")[0]
        page.close()
