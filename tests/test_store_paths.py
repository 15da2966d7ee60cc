"""URLs of object stores: which are accepted, and which arguments refuse them instead of using a local directory."""

import pickle
from pathlib import Path

import fsspec
import pytest
from train_fixtures import config_of, write_config

import vllama_jax as vl
from vllama_jax.cli import main
from vllama_jax.errors import StoreError
from vllama_jax.io import atomic, paths
from vllama_jax.io.paths import as_path
from vllama_jax.io.store_path import StorePath


@pytest.fixture
def bucket():
    """fsspec's store in memory, empty."""
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    """A folder that must stay empty: no URL may become a local directory."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert not list(folder.iterdir())


def error_line(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert str(stopped.value).startswith("vllama: ")
    assert "\n" not in str(stopped.value)
    return str(stopped.value).removeprefix("vllama: ")


@pytest.mark.parametrize("text", ["run", "/run", "./gs", "a:b", "c:/run", "notascheme:/run", "gs:run"])
def test_local_paths_stay_local(text):
    assert as_path(text) == Path(text)
    assert as_path(Path(text)) == Path(text)


def test_urls_are_normalized():
    assert str(as_path("S3://bucket//run/")) == "s3://bucket/run"
    assert as_path("s3://bucket/run") / "step_1" == as_path("s3://bucket/run/step_1")
    path = as_path("memory://bucket/run/step_1")
    assert (path.name, str(path.parent), str(path.with_name("step_2"))) == (
        "step_1",
        "memory://bucket/run",
        "memory://bucket/run/step_2",
    )
    assert str(path.parent.parent) == str(path.parent.parent.parent) == "memory://bucket"
    assert pickle.loads(pickle.dumps(path)) == path
    assert as_path(path) is path


def test_a_store_path_is_no_local_path():
    """`Path(...)` of a URL would be a local directory named "s3:"."""
    with pytest.raises(TypeError):
        Path(as_path("s3://bucket/run"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere://bucket/run", "nowhere://bucket/run: unknown scheme nowhere://; use a local path, or a URL such as"),
        ("s3://", "s3://: has no bucket; pass s3://BUCKET/NAME"),
        ("file:///data/run", "file:///data/run: file URLs are not supported; pass the path, /data/run"),
        (Path("gs://bucket/run"), "gs:/bucket/run: the URL has lost a slash"),
    ],
)
def test_unusable_urls_are_refused(text, message):
    with pytest.raises(StoreError) as refused:
        as_path(text)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("url", "extra"),
    [
        ("gs://bucket/run", "gcsfs: pip install 'vllama-jax[gcs]'"),
        ("s3://bucket/run", "s3fs: pip install 'vllama-jax[s3]'"),
    ],
)
def test_a_missing_package_is_named(url, extra, monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match=url) as refused:
        as_path(url)
    assert str(refused.value).endswith(extra)
    with pytest.raises(StoreError, match=url):
        vl.load(url)


def test_every_command_refuses_an_unknown_scheme(tmp_path, records, one_device):
    """One line and exit code 1, before anything is read or written."""
    url, absent = "nowhere://bucket/run", str(tmp_path / "absent")
    config = str(write_config(tmp_path / "config.py", config_of(absent, records)))
    for arguments in (
        ["chat", "clip.mp4", "--model", url],
        ["convert", absent, "--out", url],
        ["data", "build", "jsonl", "--source", absent, "--out", url],
        ["data", "check", url],
        ["eval", "msvd_qa", "--annotations", absent, "--videos", absent, "--model", absent, "--out", url],
        ["export", absent, "--out", url],
        ["features", config, "--out", url],
        ["inspect", url],
        ["memory", url],
        ["plot", url],
        ["quantize", url, "--out", absent],
        ["train", config, "--out", url],
        ["train", config, "--model", url, "--out", absent],
        ["verify", url],
    ):
        assert error_line(*arguments).startswith(f"{url}: unknown scheme nowhere://"), arguments


def test_commands_that_write_local_files_refuse_a_store(tmp_path, bucket):
    url, absent = "memory://bucket/out", str(tmp_path / "absent")
    (tmp_path / "clip.mp4").write_bytes(b"")
    refused = f"{url}: written to local directories only; pass a local path, and copy it afterwards"
    assert error_line("export", absent, "--out", url) == refused
    benchmark = ["eval", "msvd_qa", "--annotations", absent, "--videos", absent, "--model", absent]
    assert error_line(*benchmark, "--out", url) == refused
    unread = f"{url}: URLs are not supported; download the file first"
    assert error_line("convert", "--llama", url, "--out", absent) == unread
    assert error_line("data", "build", "jsonl", "--source", url, "--out", absent) == unread
    assert error_line("chat", url, "What?") == unread
    assert not bucket.store


def test_errors_of_a_store_are_one_line(bucket, monkeypatch):
    """Clients raise errors of their own types; pathlib's callers handle OSError."""

    def fail(*arguments, **options):
        raise RuntimeError("the token\nhas expired")

    path = as_path("memory://bucket/a")
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        path.read_bytes()
    for name in ("cat_file", "pipe_file", "find"):
        monkeypatch.setattr(type(bucket), name, fail)
    for request in (path.read_bytes, lambda: path.write_bytes(b""), path.file_sizes):
        with pytest.raises(OSError, match="the token has expired") as failed:
            request()
        assert (failed.value.strerror, failed.value.filename) == ("the token has expired", str(path))


def test_directories_of_a_store(bucket):
    root = as_path("memory://bucket/run")
    assert not root.exists()
    assert not root.is_dir()
    (root / "step_1/digests.json").write_bytes(b"{}")
    (root / "config.json").write_bytes(bytearray(b"[1]"))
    assert root.is_dir()
    assert (root / "config.json").is_file()
    assert [path.name for path in root.iterdir()] == ["config.json", "step_1"]
    assert root.file_sizes() == {"config.json": 3, "step_1/digests.json": 2}
    assert list(root.glob("step_*")) == [root / "step_1"]
    assert list(root.glob("*/digests.json")) == [root / "step_1/digests.json"]
    assert (root / "config.json").stat().st_size == 3
    assert (root / "config.json").read_bytes(1, 2) == b"1"
    (root / "step_1").rmtree()
    (root / "config.json").unlink()
    (root / "config.json").unlink(missing_ok=True)
    assert not root.exists()


def test_an_object_is_created_once(bucket):
    path = as_path("memory://bucket/lease")
    path.create_bytes(b"a")
    with pytest.raises(FileExistsError):
        path.create_bytes(b"b")
    assert path.read_bytes() == b"a"


def test_a_directory_on_a_store_is_written_in_place(bucket):
    out = as_path("memory://bucket/model")
    with atomic.new_directory(out) as directory:
        assert isinstance(directory, StorePath)
        atomic.write_json(directory / "params/a/0", [0])
        assert (out / ".partial.json").exists()
        atomic.write_json(directory / "manifest.json", {})
    assert out.file_sizes().keys() == {"params/a/0", "manifest.json"}
    with pytest.raises(vl.CheckpointError, match="memory://bucket/model: already exists"), atomic.new_directory(out):
        pass


def test_a_directory_that_fails_leaves_nothing(bucket):
    out = as_path("memory://bucket/model")

    def fail():
        with atomic.new_directory(out) as directory:
            (directory / "params").write_bytes(b"1")
            raise OSError(28, "No space left on device")

    with pytest.raises(vl.CheckpointError, match="No space left on device"):
        fail()
    assert not bucket.store


def test_partial_output_of_a_killed_process_is_removed(bucket):
    out = as_path("memory://bucket/model")
    (out / "params/a/0").write_bytes(b"1")
    (out / ".partial.json").write_bytes(b'{"owner": "process 1 on host", "token": "other", "renewed": 1.0}')
    with atomic.new_directory(out) as directory:
        assert not (out / "params").exists()
        atomic.write_json(directory / "manifest.json", {})
    assert out.file_sizes().keys() == {"manifest.json"}


def test_another_directory_is_never_emptied(bucket):
    """A run directory whose process was killed has a lease, but of another name."""
    out = as_path("memory://bucket/run")
    (out / "config.json").write_bytes(b"{}")
    (out / ".lease.json").write_bytes(b'{"owner": "process 1 on host", "token": "other", "renewed": 1.0}')
    with pytest.raises(vl.CheckpointError, match="already exists"), atomic.new_directory(out):
        pass
    with pytest.raises(vl.CheckpointError, match="cannot be replaced"), atomic.replacement_directory(out):
        pass
    assert (out / "config.json").exists()
