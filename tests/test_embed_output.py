"""`vllama embed`: the written file and its index, resuming after an interruption, and errors."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from cli_fixtures import VLLAMA, expect_error_line, expect_usage_error
from media_fixtures import write_media, write_video
from safetensors.numpy import load_file

from vllama_jax import cli
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.embed import EmbedOptions, FileFeatures, embed_files, load_encoders, storage
from vllama_jax.embed.storage import write_features
from vllama_jax.errors import CheckpointError, ConfigError, DataError

IMAGEBIND = EmbedOptions(features=("imagebind",), batch_size=8)  # a video of 8 frames is a batch


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return write_media(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def written(tiny_model, files, tmp_path_factory) -> Path:
    """ImageBind's vectors of a video, a corrupt file, an audio file and an image. Read-only."""
    out = tmp_path_factory.mktemp("written") / "x.safetensors"
    write_features(open_model(tiny_model), some(files), out, IMAGEBIND)
    return out


def some(files: dict[str, Path]) -> list[Path]:
    return [files[name] for name in ("video", "corrupt", "audio", "image")]


def read_index(out: Path) -> dict:
    return json.loads(out.with_suffix(".json").read_text())


def test_rows_of_the_file_are_those_of_the_index(written, tiny_model, files):
    arrays, index = load_file(written), read_index(written)
    assert {name: list(array.shape) for name, array in arrays.items()} == index["shapes"]
    assert index["arrays"] == "x.safetensors"
    assert index["features"] == ["imagebind"]
    assert index["model"]["digest"] == open_model(tiny_model).digest
    records = embed_files(load_encoders(tiny_model, ["imagebind"]), some(files), **dataclasses.asdict(IMAGEBIND))
    for entry, record in zip(index["files"], records, strict=True):
        assert entry["file"] == record.file
        assert entry.get("error", "") == record.error
        rows = entry.get("rows", {})
        assert rows.keys() == record.arrays.keys()
        for name, (start, end) in rows.items():
            np.testing.assert_array_equal(arrays[name][start:end], record.arrays[name])
        np.testing.assert_allclose(entry.get("timestamps", ()), record.timestamps, atol=1e-6)
        np.testing.assert_allclose(entry.get("clip_starts", ()), record.clip_starts, atol=1e-6)
    assert sorted(path.name for path in written.parent.iterdir()) == ["x.json", "x.safetensors"]


def test_npz_has_the_same_arrays(written, tiny_model, files, tmp_path):
    write_features(open_model(tiny_model), some(files), tmp_path / "x.npz", IMAGEBIND)
    arrays = load_file(written)
    with np.load(tmp_path / "x.npz") as found:
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
    index = read_index(tmp_path / "x.npz")
    assert index == read_index(written) | {"arrays": "x.npz"}


def test_the_command_reports_arrays_and_unusable_files(tiny_model, files, tmp_path, capsys):
    out, image, corrupt = tmp_path / "new" / "x.safetensors", files["image"], files["corrupt"]
    paths, options = (image, corrupt, image), ("--features", "imagebind", "--batch-size", 8)
    cli.main(list(map(str, ("embed", *paths, *options, "--model", tiny_model, "--out", out))))
    printed = capsys.readouterr()
    width = open_model(tiny_model).config.imagebind.embed_dim
    assert printed.out.splitlines() == [
        f"imagebind_image  [1, {width}]",
        f"imagebind_audio  [0, {width}]",
        f"{out}: features of 1 of 2 files; index: {out.with_suffix('.json')}",
    ]
    assert printed.err.startswith(f"not used: {corrupt}: ")
    assert printed.err.count("\n") == 1
    assert {name: array.shape for name, array in load_file(out).items()} == {
        "imagebind_image": (1, width),
        "imagebind_audio": (0, width),
    }


def test_the_command_prints_json(tiny_model, files, tmp_path, capsys):
    command = ["embed", str(files["image"]), "--features", "imagebind", "--model", str(tiny_model), "--json"]
    cli.main([*command, "--out", str(tmp_path / "x.npz")])
    summary = json.loads(capsys.readouterr().out)
    assert summary["num_files"] == 1
    assert summary["shapes"]["imagebind_image"][0] == 1
    assert summary["errors"] == []


def interrupt_after(monkeypatch, count: int) -> None:
    """Interrupt the next command when it has written `count` files and the first rows of the next one."""
    add, done = storage._PartialFeatures.add, []

    def interrupted(partial, record: FileFeatures) -> None:
        if len(done) == count:
            partial._files["imagebind_image"].write(b"\1" * 100)
            with (partial._folder / "index.jsonl").open("a") as index:
                index.write('{"file": "')
            raise KeyboardInterrupt
        done.append(record.file)
        add(partial, record)

    monkeypatch.setattr(storage._PartialFeatures, "add", interrupted)


def test_an_interrupted_command_resumes_without_encoding_a_file_twice(
    written, tiny_model, files, tmp_path, monkeypatch
):
    out, encoded = tmp_path / "x.safetensors", []
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            write_features(open_model(tiny_model), some(files), out, IMAGEBIND)
    assert [path.name for path in tmp_path.iterdir()] == [".x.safetensors.partial"]
    monkeypatch.setattr(storage, "embed_files", lambda model, names, **options: recorded(model, names, options))

    def recorded(model, names, options):
        encoded.extend(names)
        return embed_files(model, names, **options)

    write_features(open_model(tiny_model), some(files), out, IMAGEBIND)
    assert encoded == [str(files["audio"]), str(files["image"])]
    assert out.read_bytes() == written.read_bytes()
    assert read_index(out) == read_index(written)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.safetensors"]


@pytest.mark.parametrize("moved", [0, 1])
def test_a_command_that_was_killed_while_files_were_moved_completes(
    written, tiny_model, files, tmp_path, monkeypatch, moved
):
    """The model is not loaded again. `moved` files are in place when the command is killed."""
    out, replace, done = tmp_path / "x.safetensors", os.replace, []

    def replaced(source, target):
        if Path(target).parent == tmp_path:
            if len(done) == moved:
                raise KeyboardInterrupt
            done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replaced)
        with pytest.raises(KeyboardInterrupt):
            write_features(open_model(tiny_model), some(files), out, IMAGEBIND)
    assert out.exists() == bool(moved)
    assert not out.with_suffix(".json").exists()
    monkeypatch.setattr(storage, "load_encoders", None)
    write_features(open_model(tiny_model), some(files), out, IMAGEBIND)
    assert out.read_bytes() == written.read_bytes()
    assert read_index(out) == read_index(written)


@pytest.fixture
def partial(tiny_model, files, tmp_path, monkeypatch) -> Path:
    """The path of an output of which one file of two is written."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            write_features(open_model(tiny_model), [files["image"], files["short"]], tmp_path / "x.npz", IMAGEBIND)
    return tmp_path / "x.npz"


def test_partial_output_of_other_settings_is_an_error(partial, tiny_model, files):
    directory, both = open_model(tiny_model), [files["image"], files["short"]]
    where = f"{partial}: partly written with other settings"
    with pytest.raises(ConfigError) as stop:
        write_features(directory, both, partial, dataclasses.replace(IMAGEBIND, num_frames=4))
    assert str(stop.value) == (
        f"{where} (num_frames was 8, now 4); run the same command again to complete it, or remove "
        f"{partial.parent / '.x.npz.partial'}"
    )
    with pytest.raises(ConfigError, match=r"\(the files differ\)"):
        write_features(directory, [files["image"], files["video"]], partial, IMAGEBIND)
    manifest = {**directory.manifest, "leaves": dict(list(directory.manifest["leaves"].items())[1:])}
    with pytest.raises(ConfigError, match=r"\(the weights of the model differ\)"):
        write_features(dataclasses.replace(directory, manifest=manifest), both, partial, IMAGEBIND)
    write_features(directory, both, partial, dataclasses.replace(IMAGEBIND, batch_size=4))


def test_corrupt_partial_output_is_an_error(partial, tiny_model, files):
    folder = partial.parent / ".x.npz.partial"
    (folder / "imagebind_image.bin").write_bytes(b"")
    with pytest.raises(DataError, match=f"has 0 of .* bytes; remove {folder} and run the command again"):
        write_features(open_model(tiny_model), [files["image"], files["short"]], partial, IMAGEBIND)
    (folder / "index.jsonl").write_text('{"rows": {"imagebind_image": 3}}\n')
    with pytest.raises(DataError, match=f"index.jsonl: corrupt; remove {folder} and run the command again"):
        write_features(open_model(tiny_model), [files["image"], files["short"]], partial, IMAGEBIND)


@pytest.mark.parametrize("name", ["x.safetensors", "x.json"])
def test_complete_output_is_not_overwritten(tiny_model, files, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"{name}: already exists; remove it or choose another path"):
        write_features(open_model(tiny_model), [files["image"]], tmp_path / "x.safetensors", IMAGEBIND)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_no_output_without_usable_files(tiny_model, files, tmp_path):
    command = ["embed", files["corrupt"], "missing.mp4", "--model", tiny_model, "--out", tmp_path / "x.npz"]
    message = expect_error_line(*command)
    assert message.startswith(f"none of 2 files can be used; the first: {files['corrupt']}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_before_the_first_file_leaves_nothing(tiny_model, files, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "load_encoders", lambda *_: (_ for _ in ()).throw(CheckpointError("corrupt")))
    with pytest.raises(CheckpointError):
        write_features(open_model(tiny_model), [files["image"]], tmp_path / "x.npz", IMAGEBIND)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_and_the_command_resumes(written, tiny_model, files, tmp_path, monkeypatch):
    out, write = tmp_path / "x.safetensors", storage.AtomicWriteFile.write

    def fail_on_a_full_disk(file, data):
        if file.tell():  # from the second file on
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage.AtomicWriteFile, "write", fail_on_a_full_disk)
        with pytest.raises(CheckpointError) as stop:
            write_features(open_model(tiny_model), some(files), out, IMAGEBIND)
    assert str(stop.value) == (
        f"{out}: cannot be written (No space left on device); run the same command again to resume"
    )
    write_features(open_model(tiny_model), some(files), out, IMAGEBIND)
    assert out.read_bytes() == written.read_bytes()


def test_a_second_command_does_not_write_at_the_same_time(partial, tiny_model, files):
    folder = partial.parent / ".x.npz.partial"
    with (
        storage.lock_directory(folder, None),
        pytest.raises(CheckpointError, match=f"{partial}: another process is writing it"),
    ):
        write_features(open_model(tiny_model), [files["image"], files["short"]], partial, IMAGEBIND)


def test_wrong_usage(tiny_model, files, tmp_path):
    required = ("--model", tiny_model, "--out", "x.npz")
    assert expect_usage_error("embed", *map(str, required)).startswith(
        "FILES is missing. Example: vllama embed clip.mp4"
    )
    for option, value, message in (("--features", "clip", "'clip' is not one of"), ("--batch-size", "0", "must be at")):
        assert message in expect_usage_error("embed", "a", option, value, *map(str, required))
    assert "--out PATH is missing" in expect_usage_error("embed", "a", "--model", str(tiny_model))
    message = expect_error_line("embed", files["image"], "--model", tiny_model, "--out", tmp_path / "x.pt")
    assert message == f"out must be a file name with the suffix .safetensors or .npz, not {tmp_path / 'x.pt'}"


@pytest.mark.slow
def test_a_killed_process_resumes(tiny_model, tmp_path):
    """SIGKILL at several moments, then the output is that of a process that was not killed."""
    clips = [write_video(tmp_path / f"{number}.mp4", num_frames=8 + number) for number in range(12)]
    command = [VLLAMA, "embed", *clips, "--model", tiny_model, "--features", "imagebind", "--batch-size", "8", "--out"]
    subprocess.run([*command, tmp_path / "whole.npz"], check=True, capture_output=True)
    lines = tmp_path / ".x.npz.partial" / "index.jsonl"
    for count in (1, 5):
        process = subprocess.Popen([*command, tmp_path / "x.npz"], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (lines.exists() and lines.read_bytes().count(b"\n") >= count):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert lines.read_bytes().count(b"\n") < len(clips)
    subprocess.run([*command, tmp_path / "x.npz"], check=True, capture_output=True)
    assert read_index(tmp_path / "x.npz") == read_index(tmp_path / "whole.npz") | {"arrays": "x.npz"}
    with np.load(tmp_path / "x.npz") as found, np.load(tmp_path / "whole.npz") as whole:
        for name in whole:
            np.testing.assert_array_equal(found[name], whole[name])
