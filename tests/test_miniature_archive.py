"""The miniature's model directory: one file in the package, and a verified copy in the cache folder."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import xxhash

import vllama_jax as vl
from vllama_jax import cli
from vllama_jax.checkpoints import shipped
from vllama_jax.checkpoints.arrays import find_corrupt_params
from vllama_jax.checkpoints.directory import find_runs, open_model
from vllama_jax.config import NO_LORA
from vllama_jax.io import archives
from vllama_jax.miniature import assets

WEIGHTS_DIGEST = "63b776f6eb3bbc77d64f43ec67d7dc8f"  # of the arrays of OUT/model, in bfloat16
UNPACK = "from vllama_jax.checkpoints.shipped import shipped_model; print(shipped_model())"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("VLLAMA_CACHE", str(tmp_path / "cache"))
    shipped._unpack_temporarily.cache_clear()
    return tmp_path / "cache"


def contents(directory: Path) -> dict[str, str]:
    """Return the digests of all files below a directory."""
    files = (file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): xxhash.xxh3_128_hexdigest(file.read_bytes()) for file in files}


def test_weights_equal_the_manifest_and_the_recorded_digest(cache):
    model = open_model("miniature")
    assert model.path.parent == cache / "miniature"
    assert find_corrupt_params(model.path / "params", model.manifest["leaves"]) == {}
    assert model.digest == WEIGHTS_DIGEST
    assert shipped.is_shipped_digest(model.digest)


def test_an_intact_copy_is_not_written_again(cache, monkeypatch):
    model = shipped.shipped_model()
    monkeypatch.setattr(archives, "lock_directory", lambda *_, **__: pytest.fail("it is unpacked again"))
    assert shipped.shipped_model() == model


def change_a_byte(model: Path) -> None:
    file = model / "params/llama.embedding/0.0"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a byte changed": change_a_byte,
    "a file deleted": lambda model: (model / "params/llama.embedding/0.0").unlink(),
    "a folder deleted": lambda model: shutil.rmtree(model / "tokenizer"),
    "a file truncated": lambda model: os.truncate(model / "manifest.json", 1000),
    "a file added": lambda model: (model / "tokenizer/tokenizer.json").write_text("{}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("corrupt", DAMAGE)
def test_a_corrupt_copy_is_replaced(cache, corrupt):
    before = contents(shipped.shipped_model())
    DAMAGE[corrupt](shipped.shipped_model())
    assert contents(next((cache / "miniature").iterdir())) != before
    assert contents(shipped.shipped_model()) == before
    assert len(list((cache / "miniature").iterdir())) == 1


def test_partial_files_of_a_killed_process_are_removed(cache):
    code = f"import os, zipfile\nzipfile.ZipFile._extract_member = lambda *_: os._exit(9)\n{UNPACK}"
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == 9
    assert [entry.name[0] for entry in (cache / "miniature").iterdir()] == ["."]
    model = shipped.shipped_model()
    assert list((cache / "miniature").iterdir()) == [model]
    assert open_model("miniature").digest == WEIGHTS_DIGEST


@pytest.mark.slow
def test_concurrent_processes_unpack_the_archive_once(cache):
    code = f"""import io, sys, vllama_jax.io.archives as archives
from vllama_jax.checkpoints.shipped import shipped_model
made = archives.scratch_directory
archives.scratch_directory = lambda *given: (print("unpacked"), made(*given))[1]
print("ready", flush=True)
sys.stdin.readline()
{UNPACK.partition(";")[2].strip()}
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(3)]
    assert {process.stdout.readline() for process in started} == {"ready\n"}
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    lines = [line for process in started for line in process.communicate()[0].split()]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert sorted(lines) == sorted(["unpacked", *[str(shipped.shipped_model())] * 3])


def test_a_cache_folder_that_cannot_be_written_is_reported_and_a_temporary_one_used(cache, tmp_path):
    cache.touch()  # a file in place of the folder
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    code = f"import logging; logging.basicConfig(format='%(message)s')\n{UNPACK}\n{UNPACK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    first, second = done.stdout.split()
    assert first == second
    folder = str(Path(first).parent)
    message = f"the miniature is unpacked to {folder} for this process, as the cache folder failed: Not a directory\n"
    assert done.stderr == message
    assert list(temporary.iterdir()) == []  # removed when the process ended


def test_no_writable_directory_is_a_one_line_error(cache, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", "miniature"])
    assert stop.value.code.startswith(
        "vllama: the miniature can be unpacked neither in the cache folder (No space left on device) nor in /"
    )
    assert stop.value.code.endswith("set VLLAMA_CACHE to a writable folder")
    assert list((cache / "miniature").iterdir()) == []


@pytest.fixture
def other_box(tmp_path, monkeypatch) -> Path:
    """A copy of the model's two files in the package, to be corrupted."""
    (tmp_path / "box").mkdir()
    for name in ("model.zip", "model.json"):
        shutil.copy(shipped.ASSETS / name, tmp_path / "box")
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "box")
    return tmp_path / "box"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory); install vllama-jax again"),
        (b"version https://git-lfs", "cannot be read (not a complete zip file); install vllama-jax again"),
        ("truncated", "cannot be read (not a complete zip file); install vllama-jax again"),
        ("changed", "differs from the file of the released package; install vllama-jax again"),
    ],
)
def test_a_corrupt_archive_is_a_one_line_error(cache, other_box, content, message):
    archive = other_box / "model.zip"
    data = bytearray(archive.read_bytes())
    archive.unlink()
    data[5000] ^= 1
    if content is not None:
        archive.write_bytes({"truncated": data[:-100], "changed": data}.get(content, content))
    with pytest.raises(vl.CheckpointError) as refused:
        vl.load("miniature")
    assert str(refused.value) == f"{archive}: {message}"
    assert not (cache / "miniature").exists() or list((cache / "miniature").iterdir()) == []


@pytest.mark.slow
def test_the_recipe_writes_the_packaged_archive(cache, other_box):
    model = shipped.shipped_model()
    before = (other_box / "model.zip").read_bytes()
    assets.pack_model(model, other_box)
    with zipfile.ZipFile(other_box / "model.zip") as new, zipfile.ZipFile(shipped.ASSETS / "model.zip") as old:
        assert [(entry.filename, entry.CRC) for entry in new.infolist()] == [
            (entry.filename, entry.CRC) for entry in old.infolist()
        ]
    assert json.loads((other_box / "model.json").read_text())["model_digest"] == WEIGHTS_DIGEST
    assert (other_box / "model.zip").read_bytes() == before or sys.version_info[:2] != (3, 11)  # zlib's own output


def test_the_unpacked_directory_is_recognized(cache):
    model = shipped.shipped_model()
    (model / "config.json").unlink()
    assert open_model(model).digest == WEIGHTS_DIGEST  # unpacked again
    assert shipped.is_shipped(model)
    assert not shipped.is_shipped(cache / "miniature/other")
    assert not shipped.is_shipped("x/miniature")


@pytest.mark.parametrize("recorded", ["/old/vllama_jax/miniature/box/model", "cache"])
def test_a_run_finds_the_miniature_in_any_location(cache, tmp_path, recorded):
    model = open_model("miniature")
    path = str(model.path) if recorded == "cache" else recorded
    run = tmp_path / "runs/one"
    run.mkdir(parents=True)
    (tmp_path / "runs/model").mkdir()  # next to the run, with the recorded name, but another model
    fields = {"format": 1, "run": {"lora": dataclasses.asdict(NO_LORA)}, "base": {"path": path, "digest": model.digest}}
    fields["model"] = dataclasses.asdict(model.config)
    (run / "config.json").write_text(json.dumps(fields))
    shutil.rmtree(cache)
    runs, base = find_runs(run)
    assert [(one.path, one.base_digest) for one in runs] == [(run, model.digest)]
    assert open_model(base).digest == model.digest


COMMANDS = [
    ["inspect", "miniature"],
    ["verify", "miniature"],
    ["memory", "miniature", "--devices", "H100"],
    pytest.param(["quantize", "miniature", "--out", "OUT"], marks=pytest.mark.slow),
    pytest.param(["export", "miniature", "--out", "OUT"], marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_accept_the_name_miniature(capsys, tmp_path, command):
    cli.main([str(tmp_path / "out") if word == "OUT" else word for word in command])
    assert capsys.readouterr().out
