"""Outputs are complete or absent, and no command deletes or overwrites a file through a symbolic link."""

import json
from pathlib import Path

import pytest
from cli_fixtures import expect_error_line
from conversions import convert_command
from train_fixtures import config_of, short_config, write_config, write_files

import vllama_jax as vl
from vllama_jax.io import atomic
from vllama_jax.io.jsonl import JsonLinesFile


@pytest.fixture
def other_directory(tmp_path) -> Path:
    """A directory outside of the output, to which links point."""
    folder = tmp_path / "treasure"
    (folder / "deep").mkdir(parents=True)
    (folder / "file.txt").write_text("gold")
    (folder / "deep" / "file.txt").write_text("silver")
    (folder / "config.json").write_text('{"evaluation": "another"}')
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def link_to_directory(other_directory: Path, partial: Path, out: Path) -> None:
    partial.symlink_to(other_directory)


def link_to_file(other_directory: Path, partial: Path, out: Path) -> None:
    partial.symlink_to(other_directory / "file.txt")


def dangling_link(other_directory: Path, partial: Path, out: Path) -> None:
    partial.symlink_to(other_directory / "absent")


def link_inside(other_directory: Path, partial: Path, out: Path) -> None:
    partial.mkdir()
    (partial / "params").symlink_to(other_directory)


def link_deep_inside(other_directory: Path, partial: Path, out: Path) -> None:
    (partial / "params" / "a").mkdir(parents=True)
    (partial / "params" / "a" / "0").symlink_to(other_directory / "file.txt")


def regular_file(other_directory: Path, partial: Path, out: Path) -> None:
    partial.write_text("mine")


def final_link(other_directory: Path, partial: Path, out: Path) -> None:
    out.symlink_to(other_directory)


def final_dangling_link(other_directory: Path, partial: Path, out: Path) -> None:
    out.symlink_to(other_directory / "absent")


PLANTED = {
    link_to_directory: ".partial: a symbolic link, but this command writes a directory there; move it away",
    link_to_file: ".partial: a symbolic link, but this command writes a directory there; move it away",
    dangling_link: ".partial: a symbolic link, but this command writes a directory there; move it away",
    link_inside: ".partial/params: a symbolic link in a directory that this command clears; remove it",
    link_deep_inside: ".partial/params/a/0: a symbolic link in a directory that this command clears; remove it",
    regular_file: ".partial: a file, but this command writes a directory there; move it away",
    final_link: "out: already exists; remove it or choose another path",
    final_dangling_link: "out: a dangling symbolic link; remove it or choose another path",
}


@pytest.fixture(scope="session")
def annotations(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("annotated") / "clips", videos=0)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("name", ["convert", "export", "quantize", "data build"])
def test_a_new_directory_is_never_written_through_links(
    tiny_files, tiny_model, annotations, other_directory, tmp_path, name, plant
):
    partial, out = tmp_path / ".out.partial", tmp_path / "out"
    arguments = {
        "convert": convert_command(tiny_files, out),
        "export": ["export", str(tiny_model), "--out", str(out)],
        "quantize": ["quantize", str(tiny_model), "--out", str(out)],
        "data build": ["data", "build", "jsonl", "--source", str(annotations), "--out", str(out)],
    }[name]
    before = contents(other_directory)
    plant(other_directory, partial, out)
    planted = sorted(tmp_path.rglob("*")), contents(tmp_path)
    assert expect_error_line(*arguments).endswith(PLANTED[plant])
    assert contents(other_directory) == before
    assert (sorted(tmp_path.rglob("*")), contents(tmp_path)) == planted


FILE_LINK = "a symbolic link, but this command writes a file there; move it away"
DIRECTORY_LINK = "a symbolic link, but this command writes a directory there; move it away"


def test_features_are_never_written_through_a_link(tiny_model, image_records, other_directory, tmp_path):
    config = write_config(tmp_path / "config.py", config_of(tiny_model, image_records))
    arguments = ["features", str(config), "--out", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    before = contents(other_directory)
    scratch = tmp_path / "out" / ".partial-0"
    scratch.symlink_to(other_directory)
    assert expect_error_line(*arguments).endswith(f".partial-0: {DIRECTORY_LINK}")
    scratch.unlink()
    scratch.mkdir()
    (scratch / "shard").symlink_to(other_directory / "file.txt")
    assert expect_error_line(*arguments).endswith(
        ".partial-0/shard: a symbolic link in a directory that this command clears; remove it"
    )
    assert contents(other_directory) == before


@pytest.mark.parametrize("name", [".config.json.partial", ".metrics.jsonl.partial", "metrics.jsonl", "samples.jsonl"])
def test_a_link_in_a_run_directory(tiny_model, image_records, other_directory, tmp_path, name):
    config = write_config(tmp_path / "config.py", short_config(tiny_model, image_records))
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(other_directory / "file.txt")
    before = contents(other_directory)
    assert expect_error_line("train", config, "--out", run).endswith(f"{name}: {FILE_LINK}")
    assert contents(other_directory) == before


@pytest.mark.parametrize(
    "name", ["config.json", ".config.json.partial", "answers.jsonl", "results.json", ".results.json.partial"]
)
def test_a_link_in_an_evaluation_directory(tiny_model, clip, other_directory, tmp_path, name):
    lines = [json.dumps({"id": "q1", "video": clip.name, "question": "What?", "answer": "a dog", "task": "open"})]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to(other_directory / "config.json")
    before = contents(other_directory)
    arguments = ["eval", "jsonl", "--annotations", str(tmp_path / "questions.jsonl"), "--videos", str(clip.parent)]
    message = expect_error_line(*arguments, "--model", tiny_model, "--out", out)
    assert message.endswith(f"{name}: {FILE_LINK}")
    assert contents(other_directory) == before


@pytest.mark.parametrize("name", ["loss.png", ".loss.png.partial"])
@pytest.mark.parametrize("named", [False, True])
def test_plots_are_never_written_through_a_link(other_directory, tmp_path, name, named):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "lr": 0.1}\n{"step": 2, "loss": 1.0, "lr": 0.1}\n')
    (run / name).symlink_to(other_directory / "file.txt")
    before = contents(other_directory)
    options = ["--out", str(run / "loss.png")] if named else []
    assert expect_error_line("plot", run, *options).endswith(f"{name}: {FILE_LINK}")
    assert contents(other_directory) == before


# The functions of vllama_jax.io.atomic.


@pytest.mark.parametrize("write", [atomic.replace_file, atomic.write_file])
def test_no_file_is_written_through_a_link(other_directory, tmp_path, write):
    (tmp_path / "file").symlink_to(other_directory / "file.txt")
    with pytest.raises((vl.CheckpointError, FileExistsError)):
        write(tmp_path / "file", b"brass")
    assert (other_directory / "file.txt").read_text() == "gold"


def test_no_line_is_added_through_a_link(other_directory, tmp_path):
    (tmp_path / "lines.jsonl").symlink_to(other_directory / "file.txt")
    with pytest.raises(vl.CheckpointError, match=f"jsonl: {FILE_LINK}"):
        JsonLinesFile(tmp_path / "lines.jsonl").add({"step": 1})
    assert (other_directory / "file.txt").read_text() == "gold"


def test_a_partial_file_that_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path / ".file.json.partial").write_text("half")
    (tmp_path / "file.json").write_text("old")
    atomic.replace_json(tmp_path / "file.json", {"a": 1})
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_failed_write_keeps_the_file_and_leaves_no_partial_one(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file.json").write_text("old")
    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.replace_json(tmp_path / "file.json", {"a": 1})
    assert (tmp_path / "file.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_hard_link_with_the_partial_name_keeps_its_other_name(other_directory, tmp_path):
    (tmp_path / ".file.json.partial").hardlink_to(other_directory / "file.txt")
    atomic.replace_json(tmp_path / "file.json", {"a": 1})
    assert (other_directory / "file.txt").read_text() == "gold"


def test_an_output_directory_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "disk")
    with atomic.new_directory(tmp_path / "here" / "out") as directory:
        (directory / "file").write_text("text")
    assert [path.name for path in (tmp_path / "disk").rglob("*")] == ["out", "file"]


def test_an_existing_output_is_reported_before_inputs_are_read(tmp_path, monkeypatch):
    """Inputs are not read before the check: they do not even exist here."""
    (tmp_path / "out").mkdir()
    out, absent = str(tmp_path / "out"), str(tmp_path / "absent")
    for arguments in (
        ["convert", "hf://org/name", "--out", out],
        ["convert", absent, "--out", out],
        ["export", absent, "--out", out],
        ["quantize", absent, "--out", out],
        ["data", "build", "jsonl", "--source", absent, "--out", out],
    ):
        assert expect_error_line(*arguments) == f"{out}: already exists; remove it or choose another path"
    (tmp_path / "out" / "config.json").write_text("{}")
    config = write_config(tmp_path / "config.py", config_of(absent, absent))
    message = expect_error_line("features", config, "--out", out)
    assert message == f"{out}: not a feature cache (it has config.json); choose another --out"
