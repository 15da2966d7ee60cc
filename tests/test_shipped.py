"""The names `miniature` and `demo`, and their priority over files of the user."""

import os
import shutil
from pathlib import Path

import pytest
from cli_fixtures import expect_error, run_vllama

import vllama_jax as vl
from vllama_jax.checkpoints import shipped
from vllama_jax.checkpoints.directory import open_model


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_users_model_directory_has_priority_but_no_other_directory(here, tiny_model):
    assert open_model("miniature").path == shipped.shipped_model()
    (here / "miniature").mkdir()
    (here / "miniature/notes.txt").touch()
    assert open_model("miniature").path == shipped.shipped_model()
    shutil.rmtree(here / "miniature")
    (here / "miniature").symlink_to(tiny_model)
    assert open_model("miniature").path == Path("miniature")
    assert open_model(here / "miniature").config == open_model(tiny_model).config


def test_a_path_that_ends_in_the_name_is_a_path(here):
    for path in ("./miniature/", "x/miniature", here / "miniature"):
        if str(Path(path)) != "miniature":
            with pytest.raises(vl.CheckpointError, match="no such model directory"):
                open_model(path)


def test_a_users_file_has_priority_but_no_directory(here):
    assert shipped.find_clip("demo").is_file()
    (here / "demo").mkdir()
    assert shipped.find_clip("demo") == shipped.CLIPS / shipped.DEMO_CLIP
    (here / "demo").rmdir()
    (here / "demo").write_bytes(b"mine")
    assert shipped.find_clip("demo") == Path("demo")


def test_chat_reads_the_users_file(here, capsys):
    (here / "demo").write_text("no video")
    assert "demo: not a video" in expect_error(capsys, "chat", "demo", "What is it?")


@pytest.mark.slow
def test_demo_prints_its_description_and_ends_with_the_input():
    done = run_vllama("chat", "demo", stdin="What do you hear?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a bell rings\n"
    lines = done.stderr.splitlines()
    assert lines[0].startswith(
        "answers are from the miniature, a model of 3 million parameters that knows only 16 objects"
    )
    assert (
        lines[1]
        == f"{shipped.CLIPS}/bell.mp4: a rendered clip of 4 seconds: a large yellow bell moves to the left and rings"
    )
    assert lines[2].endswith("bell.mp4: 8 frames of 4.0 s; audio used")
    assert lines[3].startswith('Ask a question, such as "Describe it."')
    assert len(lines) == 4


NOT_ALLOWED = "URLs are downloaded only with --allow-url, in Python with allow_url=True"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://x.org/a.mp4?b=c", f"https://x.org/a.mp4: {NOT_ALLOWED}"),
        ("HTTP://x.org/a.mp4", f"HTTP://x.org/a.mp4: {NOT_ALLOWED}"),
        ("gs://bucket/a.mp4", "gs://bucket/a.mp4: URLs are not supported; download the file first"),
        ("s3://bucket/a.mp4", "s3://bucket/a.mp4: URLs are not supported; download the file first"),
        ("rtsp://me:secret@camera/1", "rtsp://camera/1: URLs are not supported; download the file first"),
        ("file:///tmp/a.mp4", "file:///tmp/a.mp4: URLs are not supported; pass the path, /tmp/a.mp4"),
        ("c:/a.mp4", "c:/a.mp4: no such file; check the path"),
        ("no:where", "no:where: no such file; check the path"),
    ],
)
def test_urls_are_refused_with_advice(here, capsys, url, message):
    assert expect_error(capsys, "chat", url, "What is it?") == f"vllama: {message}"
    with pytest.raises(vl.MediaError) as refused:
        vl.media.read_media(url)
    assert str(refused.value) == message


def test_a_file_whose_name_looks_like_a_url_is_read(here, capsys):
    os.makedirs(here / "http:/x")
    (here / "http:/x/a.mp4").write_text("no video")
    assert "not a video" in expect_error(capsys, "chat", "http://x/a.mp4", "What is it?")
