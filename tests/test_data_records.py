"""Records directories: what is read equals what was built, from any process; incomplete ones are not opened."""

import functools
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import tensorflow_datasets as tfds
from data_fixtures import build_and_read, media, to_json_lines, write_folder

from vllama_jax.data import tfds_builders
from vllama_jax.data.build import build
from vllama_jax.data.records import Records, open_records
from vllama_jax.errors import CheckpointError, DataError, StoreError
from vllama_jax.io.prefetch import map_in_order

COUNT = 40


def content(number: int) -> bytes:
    return media(bytes([number]) * (996 + number))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A source that alternates videos and images."""
    names = [f"{number}.{'jpg' if number % 2 else 'mp4'}" for number in range(COUNT)]
    text = to_json_lines(*({"image" if "jpg" in name else "video": name, "caption": f"it is {name}"} for name in names))
    files = {name: content(number) for number, name in enumerate(names)}
    return write_folder(tmp_path_factory.mktemp("data") / "source", {"a.jsonl": text, **files})


@pytest.fixture
def out(source, tmp_path, monkeypatch) -> Path:
    """Records in several files of about four each."""
    monkeypatch.setattr(tfds_builders, "RECORD_SHARD_BYTES", 4000)
    build("jsonl", source, tmp_path / "out")
    return tmp_path / "out"


def numbers_of(records: Records) -> list[int]:
    """Return the numbers that media encode, and check each against its annotation."""
    found = []
    for index in range(len(records)):
        data, annotation = records.media(index), records.annotation(index)
        assert data == content(data[-1])
        assert annotation.turns == (("", f"it is {annotation.id}"),)
        assert annotation.id.split(".")[0] == str(data[-1])
        found.append(data[-1])
    return found


def test_bytes_and_order_come_back(out):
    records = open_records(str(out))
    assert len(list((out / "media").glob("*array_record*"))) > 5
    assert numbers_of(records) == [*range(0, COUNT, 2), *range(1, COUNT, 2)]
    assert records.kinds == {"video": range(20), "image": range(20, 40), "audio": range(40, 40)}
    assert records.sizes == {"video": sum(len(content(n)) for n in range(0, 40, 2)), "image": 20 * 1020}
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "media", "skipped.jsonl", "texts"]


def test_tfds_reads_texts_and_media(out):
    for folder in ("texts", "media"):
        examples = tfds.builder_from_directory(out / folder).as_data_source(split="train")
        assert len(examples) == COUNT
        assert examples[0]["id"] == b"0.mp4"


def test_the_digest_is_of_the_content(source, out, tmp_path):
    build("jsonl", source, tmp_path / "again")  # into other files
    assert open_records(tmp_path / "again").digest == open_records(out).digest
    other = shutil.copytree(source, tmp_path / "other")
    (other / "3.jpg").write_bytes(media(b"\x03"))
    build("jsonl", other, tmp_path / "changed")
    assert open_records(tmp_path / "changed").digest != open_records(out).digest


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_read_the_same_bytes(out, start):
    records = open_records(out)
    records.media(0)  # a file is open in this process
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.apply(numbers_of, [records]) == numbers_of(records)


def test_concurrent_threads_read_the_same_bytes(out):
    records = pickle.loads(pickle.dumps(open_records(out)))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(records.media, [*range(COUNT)] * 5))
    assert found == [records.media(number) for number in range(COUNT)] * 5


def test_rebuilt_records_are_read_again(source, tmp_path):
    text = {"video": "0.mp4", "caption": "old"}
    for caption in ("old", "new"):
        table = write_folder(
            tmp_path / "source", {"a.jsonl": to_json_lines({**text, "caption": caption}), "0.mp4": media(b"0")}
        )
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (annotation,), _ = build_and_read("jsonl", table, tmp_path / "out")
        assert annotation.turns == (("", caption),)


@pytest.mark.parametrize("folder", ["texts", "media"])
def test_missing_and_truncated_files_are_one_line_each(out, folder):
    file = max((out / folder).glob("*array_record*"))
    data = file.read_bytes()
    file.write_bytes(data[:1000])
    with pytest.raises(DataError, match=rf"{file.name}: has 1000 bytes instead of {len(data)}"):
        open_records(out)
    file.unlink()
    with pytest.raises(DataError, match=rf"{file.name}: No such file or directory; copy or build the records again"):
        open_records(out)


def test_corrupt_and_missing_records_are_reported(out):
    records = open_records(out)
    file = min((out / "media").glob("*array_record*"))
    data = bytearray(file.read_bytes())
    start = data.index(content(0)[:500])
    data[start : start + 9] = b"\xff" * 9
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"media: record 0 cannot be read \(.*hash mismatch") as caught:
        records.media(0)
    assert "\n" not in str(caught.value)
    assert records.media(1) == content(2)
    with pytest.raises(DataError, match="record 40 cannot be read"):
        records.annotation(40)


@pytest.mark.parametrize(
    "fields",
    [{"kinds": {"clip": 1}}, {"kinds": {"video": -1}}, {"kinds": 3}, {"files": None}, {"sizes": {"video": "1"}}],
)
def test_an_invalid_manifest_is_refused(out, fields):
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, **fields}))
    with pytest.raises(DataError, match=r"manifest\.json: incomplete"):
        open_records(out)


def test_records_of_another_version_are_an_error(out):
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(DataError, match="records of format 2, but this version reads 1; build them again"):
        open_records(out)
    (out / "manifest.json").write_text(json.dumps({**manifest, "kinds": {"video": 9}}))
    with pytest.raises(DataError, match=r"does not have the number of records given in manifest\.json"):
        open_records(out)


def test_directories_without_records_are_refused(tmp_path):
    with pytest.raises(DataError, match="not a records directory"):
        open_records(tmp_path)
    (tmp_path / "manifest.json").write_text("[")
    with pytest.raises(DataError, match=r"not JSON.*; build the records again"):
        open_records(tmp_path)


@pytest.fixture
def bucket(out, tmp_path, monkeypatch) -> Iterator[fsspec.AbstractFileSystem]:
    """The records in storage that is not a local disk."""
    monkeypatch.setenv("VLLAMA_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.put(str(out), "/bucket/records", recursive=True)
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_files_of_a_url_are_copied_once_and_media_when_they_are_read(bucket, monkeypatch):
    copied = []
    get_file = bucket.get_file
    monkeypatch.setattr(type(bucket), "get_file", lambda self, *paths: (copied.append(paths[0]), get_file(*paths)))
    records = open_records("memory://bucket/records")
    assert not list((records.path / "media").glob("media-train*"))
    assert numbers_of(records) == [*range(0, COUNT, 2), *range(1, COUNT, 2)]
    records.media(0)
    records.media(1)
    media = next((records.path / "media").glob("media-train*"))
    assert copied.count(f"memory://bucket/records/media/{media.name}") == 1
    text = next((records.path / "texts").glob("texts-train*"))
    text.write_bytes(b"")  # as if the copy had been stopped
    copied.clear()
    assert open_records("memory://bucket/records").path == records.path
    assert [Path(path).name for path in copied] == [text.name]


def test_an_unreadable_url_is_reported(bucket):
    with pytest.raises(
        DataError, match=r"memory://bucket/none: not a records directory \(no manifest.json in it\); create it with"
    ):
        open_records("memory://bucket/none")
    with pytest.raises(StoreError, match="nowhere://bucket: unknown scheme nowhere://"):
        open_records("nowhere://bucket")


class Stop(Exception):
    """An error that stops a build."""


@pytest.mark.parametrize("stage", ["annotations", "files"])
def test_an_interrupted_build_leaves_nothing(source, tmp_path, stage):
    def progress(what: str, done: int, full: int) -> None:
        if (what, done) == (stage, 30):
            raise Stop

    with pytest.raises(Stop):
        build("jsonl", source, tmp_path / "out", progress)
    assert not list(tmp_path.iterdir())


def test_a_file_deleted_during_the_build_is_an_error(source, tmp_path):
    copied = shutil.copytree(source, tmp_path / "source")

    def progress(what: str, done: int, full: int) -> None:
        if what == "files":
            (copied / "39.jpg").unlink(missing_ok=True)

    with pytest.raises(DataError, match=r"39\.jpg: can no longer be read"):
        build("jsonl", copied, tmp_path / "out", progress)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _build_on_a_full_disk(source: Path, out: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    try:
        build("jsonl", source, out)
    except CheckpointError as error:
        return str(error)
    return "built"


def test_a_full_disk_is_a_one_line_error(source, tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        message = pool.apply(_build_on_a_full_disk, [source, tmp_path / "out"])
    assert message.startswith(f"{tmp_path / 'out'}: cannot be written (")
    assert "File too large" in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_shard_counts_follow_from_the_sizes(monkeypatch):
    monkeypatch.setattr(tfds_builders, "RECORD_SHARD_BYTES", 100)
    assert tfds_builders.plan_shards([60, 60, 60, 60, 10]) == [2, 2, 1]
    assert tfds_builders.plan_shards([1000, 1, 99, 1000]) == [1, 2, 1]
    assert tfds_builders.plan_shards([5]) == [1]
    counts = tfds_builders.plan_shards([100] * 10000)
    assert len(counts) <= tfds_builders.MAX_SHARDS + 1
    assert sum(counts) == 10000


@pytest.mark.slow
def test_media_are_not_held_in_memory(tmp_path):
    """TensorFlow is not needed either, as it would be for TFDS's own ways to keep an order."""
    megabytes, copies = 4, 30
    with (tmp_path / "big.mp4").open("wb") as file:
        file.write(media(b""))
        file.truncate(megabytes * 2**20)
    (tmp_path / "a.jsonl").write_text(to_json_lines(*[{"video": "big.mp4", "caption": "a dog"}] * copies))
    code = (
        "import resource, sys; from pathlib import Path; from vllama_jax.data.build import build; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; before = peak(); "
        f"build('jsonl', Path({str(tmp_path)!r}), Path({str(tmp_path / 'out')!r})); "
        "print(peak() - before, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, tensorflow = done.stdout.split()
    assert int(grown) < megabytes * copies * 0.7
    assert tensorflow == "False"
    assert len(open_records(tmp_path / "out")) == copies


def test_prefetching_is_bounded_and_ordered():
    running, most, lock = set(), [0], threading.Lock()

    def slow(number: int) -> int:
        with lock:
            running.add(number)
            most[0] = max(most[0], len(running))
        time.sleep(0.001 * (number % 3))
        with lock:
            running.discard(number)
        return number

    assert list(map_in_order(slow, iter(range(50)), 4)) == list(range(50))
    assert 1 < most[0] <= 4
    taken = []
    endless = map_in_order(lambda number: number, map(functools.partial(_note, taken), iter(int, 1)), 4)
    assert [next(endless) for _ in range(3)] == [0, 0, 0]
    assert len(taken) <= 7
    endless.close()


def _note(taken: list[int], number: int) -> int:
    taken.append(number)
    return number


def test_importing_records_imports_neither_jax_nor_tfds():
    code = "import sys, vllama_jax.data.records; print({'jax', 'tensorflow_datasets', 'tensorflow'} & set(sys.modules))"
    environment = {**os.environ}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "set()"


SEQUENCE = "tensorflow_datasets.core.features.sequence_feature.Sequence"
CLASS = '"pythonClassName": "{}"'


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Change a file of a records directory and its recorded size in manifest.json, as an attacker would."""
    path.write_text(change(path.read_text()))
    top = path.parent.parent / "manifest.json"
    manifest = json.loads(top.read_text())
    manifest["files"][f"{path.parent.name}/{path.name}"] = path.stat().st_size
    top.write_text(json.dumps(manifest))


def with_field(name: str, value: object) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), name: value})


@pytest.fixture
def hostile_modules(tmp_path, monkeypatch) -> Path:
    """Modules named `evilmod` and `this` on the import path, which write a file when they are imported."""
    witness = tmp_path / "imported"
    for name in ("evilmod", "this"):
        (tmp_path / "modules" / name).mkdir(parents=True)
        (tmp_path / "modules" / name / "__init__.py").write_text(f"open({str(witness)!r}, 'w')")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return witness


@pytest.mark.parametrize("folder", ["texts", "media"])
@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "features.json",
            lambda text: text.replace("tensorflow_datasets.core.features.text_feature.Text", "this.X"),
            r"features\.json: unexpected feature class 'this\.X'; build the records again",
        ),
        (
            "features.json",
            lambda text: text.replace("tensorflow_datasets.core.features.features_dict", "evilmod"),
            r"features\.json: unexpected feature class 'evilmod\.FeaturesDict'",
        ),
        ("features.json", lambda text: text.replace("text_feature", "evilmod"), r"features\.evilmod\.Text'"),
        (
            "features.json",
            lambda text: json.dumps({"type": "evilmod.X", "content": {}}),
            r"unexpected feature class 'evilmod\.X'",
        ),
        (
            "features.json",
            lambda text: text.replace('"id": {', '"more": {"pythonClassName": "evilmod.X", "text": {}}, "id": {'),
            r"unexpected feature class 'evilmod\.X'",
        ),
        (
            "features.json",
            lambda text: text.replace('"id": {', '"more": {' + CLASS.format(SEQUENCE) + '}, "id": {'),
            r"features\.json: (does not have the features|unexpected feature class)",
        ),
        (
            "features.json",
            lambda text: text.replace('"id"', '"name"'),
            "does not have the features of a records directory",
        ),
        ("features.json", lambda text: "{}", "does not have the features of a records directory"),
        ("features.json", lambda text: '["evilmod.X"]', "must contain a JSON object, not list"),
        ("features.json", lambda text: "[" * 100_000, "nested too deeply"),
        ("dataset_info.json", with_field("moduleName", "evilmod"), "unexpected value of moduleName"),
        ("dataset_info.json", with_field("moduleName", "vllama_jaxx.evil"), "unexpected value of moduleName"),
        ("dataset_info.json", with_field("name", "../texts"), "unexpected value of name"),
        ("dataset_info.json", with_field("fileFormat", "tfrecord"), "unexpected value of fileFormat"),
        ("dataset_info.json", with_field("splits", []), "unexpected value of splits"),
        (
            "dataset_info.json",
            with_field("splits", [{"name": "test", "shardLengths": ["40"]}]),
            "unexpected value of splits",
        ),
        ("dataset_info.json", with_field("splits", [{"name": "train"}]), "its shardLengths are not numbers"),
        (
            "dataset_info.json",
            with_field("splits", [{"name": "train", "shardLengths": ["-1", "41"]}]),
            "its shardLengths are not numbers",
        ),
        (
            "dataset_info.json",
            with_field("splits", [{"name": "train", "shardLengths": ["20", "20", "0"]}]),
            r"-train\.array_record-00000-of-00003: not one of the files that manifest\.json lists",
        ),
        (
            "dataset_info.json",
            with_field(
                "splits", [{"name": "train", "shardLengths": ["40"], "filepathTemplate": "/etc/{DATASET}{SPLIT}"}]
            ),
            "unexpected value of filepathTemplate",
        ),
    ],
)
def test_nothing_that_a_records_directory_names_is_imported(out, hostile_modules, folder, file, change, message):
    rewrite(out / folder / file, change)
    with pytest.raises(DataError, match=message) as caught:
        open_records(out)
    assert "\n" not in str(caught.value)
    assert not hostile_modules.exists()
    assert "evilmod" not in sys.modules


def test_other_fields_of_dataset_info_are_ignored(out, hostile_modules):
    """Older and newer TFDS versions may write other fields; `redirect`s and locations are not followed."""
    info = out / "texts" / "dataset_info.json"
    for field in ("location", "downloadSize", "configName", "isBlocked", "dataSourceAccesses", "redirectURL"):
        rewrite(info, with_field(field, "evilmod"))
    assert numbers_of(open_records(out)) == [*range(0, COUNT, 2), *range(1, COUNT, 2)]
    assert not hostile_modules.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "texts/../../secret", "texts/a/b", "texts/..", ""])
def test_a_manifest_that_names_files_elsewhere(out, name):
    (out.parent / "secret").write_text("x")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "files": {**manifest["files"], name: 1}}))
    with pytest.raises(
        DataError,
        match=r"manifest\.json: incomplete \(.* is not a file of a records directory\); build the records again",
    ):
        open_records(out)


def test_a_media_type_that_differs_from_the_manifest_is_refused(out):
    """Images follow videos; a manifest with other numbers contradicts the annotations."""
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "kinds": {"video": 21, "image": 19}}))
    records = open_records(out)
    assert records.annotation(19).kind == "video"
    with pytest.raises(DataError, match=r"texts: record 20 is corrupt \(its kind 'image' contradicts manifest\.json"):
        records.annotation(20)


def test_a_corrupt_skipped_file_is_refused(out):
    (out / "skipped.jsonl").write_text('{"id": "a", "why": "b"}\n{"id": 1e999}\n')
    skipped = open_records(out).skipped()
    assert next(skipped) == {"id": "a", "place": "", "why": "b"}, "as versions without places wrote it"
    with pytest.raises(DataError, match=r"skipped\.jsonl, line 2: not JSON"):
        next(skipped)


def test_a_url_whose_files_would_be_written_elsewhere(bucket, tmp_path):
    key = "/bucket/records/texts/../../../escaped"
    bucket.store[key] = bucket.store["/bucket/records/manifest.json"]
    with pytest.raises(DataError, match=r"has a file named 'texts/\.\./\.\./\.\./escaped', which leads outside"):
        open_records("memory://bucket/records")
    assert not list(tmp_path.rglob("escaped"))


def test_a_url_with_planted_class_names(bucket, hostile_modules):
    features = json.loads(bucket.cat_file("/bucket/records/texts/features.json"))
    data = json.dumps({**features, "pythonClassName": "evilmod.X"}).encode()
    bucket.pipe_file("/bucket/records/texts/features.json", data)
    manifest = json.loads(bucket.cat_file("/bucket/records/manifest.json"))
    manifest["files"]["texts/features.json"] = len(data)
    bucket.pipe_file("/bucket/records/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(DataError, match=r"unexpected feature class 'evilmod\.X'"):
        open_records("memory://bucket/records")
    assert not hostile_modules.exists()
