"""The feature cache: training from it equals training on media; writing resumes; mismatches are refused."""

import dataclasses
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import media_fixtures
import numpy as np
import pytest
from PIL import Image

from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli import main
from vllama_jax.data.build import build
from vllama_jax.data.config import CONVERSATION, DataConfig, DatasetConfig
from vllama_jax.data.feature_cache import FeatureCache
from vllama_jax.data.records import open_records
from vllama_jax.errors import CheckpointError, ConfigError, DataError
from vllama_jax.media.write import write_video
from vllama_jax.sharding import use_mesh
from vllama_jax.train import precompute, setup
from vllama_jax.train.config import AUDIO_BRANCH, OptimConfig, TrainConfig, ValidationConfig
from vllama_jax.train.feature_settings import open_caches
from vllama_jax.train.loop import make_train_step
from vllama_jax.train.precompute import precompute_features

SLOW = pytest.mark.slow
STEPS = 4
VLLAMA = str(Path(sys.executable).with_name("vllama"))


@pytest.fixture(scope="module", autouse=True)
def one_encoder():
    """Load and compile encoders once for all tests."""
    load, loaded = precompute.load_encoder, {}

    def load_once(config, directory, components):
        name = (directory.path, config.branch, config.compute_dtype, frozenset(components))
        if name not in loaded:
            loaded[name] = load(config, directory, components)
        return loaded[name]

    precompute.load_encoder = load_once
    yield
    precompute.load_encoder = load


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Five videos, one of which cannot be decoded, and four images, with conversations."""
    folder = tmp_path_factory.mktemp("seen") / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number in range(5):
        frames = rng.integers(0, 256, (10 + number, 32, 32, 3)).astype(np.uint8)
        write_video(folder / f"{number}.mp4", frames, fps=5)
        lines.append({"video": f"{number}.mp4", "question": "<video>\nWhat?", "answer": f"Video {number}."})
    corrupt = (folder / "2.mp4").read_bytes()
    (folder / "2.mp4").write_bytes(corrupt[: len(corrupt) // 2])
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (50, 60, 3)).astype(np.uint8)).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": "<image>\nWhat?", "answer": f"Picture {number}."})
    return built(folder, lines)


@pytest.fixture(scope="module")
def audio_records(tmp_path_factory) -> Path:
    """Three audio files with captions."""
    folder = tmp_path_factory.mktemp("heard") / "clips"
    folder.mkdir()
    for number in range(3):
        tone = media_fixtures.tone(1 + number, 16000)
        media_fixtures.write_audio(folder / f"{number}.wav", tone, 16000, "pcm_s16le", "s16")
    return built(folder, [{"audio": f"{number}.wav", "caption": f"tone {number}"} for number in range(3)])


def built(folder: Path, lines: list[dict]) -> Path:
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder.parent / "records"
    build("jsonl", folder, out)
    return out


def config_of(model, *paths, branch="vision", variants=0, **options) -> TrainConfig:
    datasets = tuple(DatasetConfig(path=str(path), text=CONVERSATION, frame_sampling="head_tail") for path in paths)
    options = {"trainable": AUDIO_BRANCH} | options if branch == "audio" else options
    data = DataConfig(length_buckets=(160,), variants=variants, num_threads=2)
    fields = {
        "steps": STEPS,
        "batch_size": 8,
        "remat_policy": "none",
        "optim": OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=0),
        "data": data,
    }
    return TrainConfig(**{"model": str(model), "branch": branch, "datasets": datasets, **fields, **options})


def with_features(config: TrainConfig, out: Path, **options) -> TrainConfig:
    data = dataclasses.replace(config.data, feature_cache=str(out), variants=0)
    return dataclasses.replace(config, data=dataclasses.replace(data, **options))


def losses(config: TrainConfig) -> tuple[list[float], set[str], list[dict[int, str]]]:
    """Return the losses of all steps, the media types of their batches, and the masked rows."""
    plan = setup.plan_run(config)
    with use_mesh(plan.mesh):
        state, frozen, step = setup.init_train_state(plan), setup.load_frozen(plan), make_train_step(plan)
        found, problems, media_types = [], [], set()
        for number in range(config.steps):
            batch = plan.reader(number)
            state, metrics = step(state, frozen, setup.shard_batch(batch.arrays, plan))
            found.append(float(metrics["loss"]))
            problems.append(batch.problems)
            media_types.add(plan.reader.sampler.rows(number).stream.kind)
    return found, media_types, problems


def open_cache(config: TrainConfig, out: Path) -> FeatureCache:
    """Open the only cache in the folder."""
    found = [(dataset, open_records(dataset.path)) for dataset in config.datasets]
    (cache,) = open_caches(with_features(config, out), open_model(config.model), found).values()
    return cache


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def cached_features(tiny_model, records, tmp_path_factory) -> tuple[TrainConfig, Path]:
    """A config of the vision branch, and its cache with two variants in three shards. Read-only."""
    config = config_of(tiny_model, records, variants=2)
    out = tmp_path_factory.mktemp("made") / "features"
    precompute_features(config, out, shard_records=4)
    return config, out


@pytest.mark.slow
@pytest.mark.parametrize("branch", [pytest.param("vision", marks=SLOW), "audio"])
def test_cached_batches_equal_live_batches(tiny_model, records, audio_records, tmp_path, branch):
    paths = (records,) if branch == "vision" else (records, audio_records)
    config = config_of(tiny_model, *paths, branch=branch, variants=2, steps=8)
    out = tmp_path / "features"
    written = precompute_features(config, out, shard_records=4)
    assert [name for name, _ in written.skipped] == ["2.mp4"]
    live, cached = setup.plan_run(config), setup.plan_run(with_features(config, out))
    encode = precompute.load_encoder(config, live.base, ["video", "image", *(["audio"] if branch == "audio" else [])])
    masked = 0
    for step in range(config.steps):
        stream = live.reader.sampler.rows(step).stream
        one, other = live.reader(step), cached.reader(step)
        expected = np.asarray(encode(stream.kind, one.arrays.pop(live.reader.media_array_name(stream))))
        found = other.arrays.pop("features")
        usable = [row for row in range(8) if row not in one.problems]
        np.testing.assert_allclose(found[usable], expected[usable], rtol=1e-6, atol=1e-7)
        assert one.problems == other.problems
        assert one.names == other.names
        for name, array in one.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[name])
        masked += len(one.problems)
    assert masked


@pytest.mark.slow
def test_encoders_are_not_loaded_for_training(cached_features):
    config, out = cached_features
    components = {path.split("/")[0] for path in setup.plan_run(with_features(config, out)).abstract_model.variables}
    assert components == {"video_qformer", "frame_positions", "llama_proj", "llama"}


@pytest.mark.slow
def test_validation_clips_need_the_encoders(cached_features, clip):
    config, out = cached_features
    config = dataclasses.replace(config, validation=ValidationConfig(interval_steps=1, clips=(str(clip),)))
    assert "vit/positions" in setup.plan_run(with_features(config, out)).abstract_model.variables


@pytest.mark.slow
def test_a_cache_has_the_outputs_of_the_encoders(cached_features):
    config, out = cached_features
    (folder,) = out.iterdir()
    opened_records = open_records(config.datasets[0].path)
    assert folder.name == f"records-{opened_records.digest[:8]}"
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"features-0000{shard}-of-00003.array_record" for shard in range(3)),
        "manifest.json",
        "skipped-00000-of-00003.jsonl",
    ]
    cache = open_cache(config, out)
    assert (cache.variants, cache.dtype) == (2, np.float32)
    assert cache.shape("video") == (8, 32, 48)
    assert cache.shape("image") == (1, 32, 48)
    features, seconds = cache.read(0, 0)
    assert features.shape == (8, 32, 48)
    assert len(seconds) == 8
    assert sorted(set(seconds)) == list(seconds)
    assert not np.array_equal(features, cache.read(0, 1)[0]), "another crop, other frames"
    features, seconds = cache.read(8, 1)
    assert features.shape == (1, 32, 48)
    assert seconds == ()
    with pytest.raises(DataError, match=r"2\.mp4: .*truncated"):
        cache.read(2, 0)
    lines = [json.loads(line) for line in (folder / "skipped-00000-of-00003.jsonl").read_text().splitlines()]
    assert [(line["record"], line["variant"], line["id"]) for line in lines] == [(2, 0, "2.mp4"), (2, 1, "2.mp4")]


def test_any_number_of_threads_and_processes_read(cached_features):
    config, out = cached_features
    cache = open_cache(config, out)
    alone = {entry: cache.read(*entry)[0] for entry in [(record, v) for record in (0, 3, 5, 8) for v in (0, 1)]}
    sent = pickle.loads(pickle.dumps(cache))
    assert sent == cache
    sampler = [*alone] * 50
    random.Random(0).shuffle(sampler)
    with ThreadPoolExecutor(8) as pool:
        for entry, (found, _) in zip(sampler, pool.map(lambda entry: sent.read(*entry), sampler), strict=True):
            np.testing.assert_array_equal(found, alone[entry])


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_the_same_bytes(cached_features, tmp_path, monkeypatch):
    config, out = cached_features
    finish, finished = precompute._ShardFile.finish, []

    def stop(self):
        if finished:
            raise KeyboardInterrupt
        finished.append(self)
        finish(self)

    monkeypatch.setattr(precompute._ShardFile, "finish", stop)
    copy = tmp_path / "features"
    with pytest.raises(KeyboardInterrupt):
        precompute_features(config, copy, shard_records=4)
    monkeypatch.undo()
    assert len(list(copy.glob("*/*.array_record"))) == 1
    with pytest.raises(DataError, match="has 1 of 3 shards; run `vllama features` again with the same settings"):
        setup.plan_run(with_features(config, copy))
    calls = []
    written = precompute_features(config, copy, progress=lambda done, all: calls.append((done, all)))
    assert (written.num_existing_shards, written.num_shards, written.records) == (1, 3, 5)
    assert calls[-1] == (5, 5)
    assert [name for name, _ in written.skipped] == ["2.mp4"]
    assert files(copy) == files(out)
    written = precompute_features(config, copy)
    assert (written.num_existing_shards, written.records) == (3, 0)
    assert files(copy) == files(out)


def test_a_corrupt_shard_is_written_again(cached_features, tmp_path):
    config, out = cached_features
    copy = tmp_path / "features"
    shutil.copytree(out, copy)
    shard = open_cache(config, copy).shard_path(1)
    full = shard.read_bytes()
    corrupt_file = bytearray(full)
    corrupt_file[len(full) // 2] ^= 1
    shard.write_bytes(corrupt_file)
    cache = open_cache(config, copy)
    with pytest.raises(DataError, match=f"{shard.name}: corrupt .* remove that file and run `vllama features` again"):
        [cache.read(record, variant) for record in (4, 5, 6, 7) for variant in (0, 1)]
    shard.write_bytes(full[: len(full) // 2])
    assert precompute_features(config, copy).num_existing_shards == 2
    assert files(copy) == files(out)


@pytest.mark.slow
def test_each_process_writes_its_own_shards(cached_features, tmp_path, monkeypatch):
    """A process does not read the shards of others."""
    config, out = cached_features
    monkeypatch.setattr(precompute, "_wait_for_other_processes", lambda: None)
    monkeypatch.setattr(precompute, "_processes", lambda: (1, 2))
    assert precompute_features(config, tmp_path / "f", shard_records=4).num_shards == 1
    assert [path.name for path in tmp_path.glob("f/*/*.array_record")] == ["features-00001-of-00003.array_record"]
    monkeypatch.setattr(precompute, "_processes", lambda: (0, 2))
    assert precompute_features(config, tmp_path / "f", shard_records=4).num_shards == 2
    assert files(tmp_path / "f") == files(out)


def changed_weights(model: Path, out: Path) -> Path:
    """Copy a model, with another hash of one weight of the image Q-Former in its manifest."""
    shutil.copytree(model, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["leaves"]["image_qformer/queries"]["xxh3_128"] = "0" * 32
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


CHANGES = {
    "seed was 42, now 7": {"seed": 7},
    "crop_area was 0.5, now 1": {"data": {"min_crop_area": 1}},
    "crop_ratio was 1.33.*, now 2.0": {"data": {"max_crop_aspect_ratio": 2.0}},
    "dtype was 'float32', now 'bfloat16'": {"compute_dtype": "bfloat16"},
    "frames was 'head_tail', now 'uniform'": {"frame_sampling": "uniform"},
    "branch was 'vision', now 'audio'": {"branch": "audio", "trainable": AUDIO_BRANCH},
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_settings_are_refused(cached_features, tmp_path, what):
    config, out = cached_features
    options = dict(CHANGES[what])
    data = dataclasses.replace(config.data, **options.pop("data", {}))
    datasets = config.datasets
    if "frame_sampling" in options:
        datasets = (dataclasses.replace(datasets[0], frame_sampling=options.pop("frame_sampling")),)
    other = dataclasses.replace(config, data=data, datasets=datasets, **options)
    with pytest.raises(
        ConfigError, match=f"records-.*{what}.* use the same settings, or recompute the features with `vllama"
    ):
        setup.plan_run(with_features(other, out))
    before = files(out)
    with pytest.raises(ConfigError, match=f"contains features computed with other settings .*{what}.* another --out"):
        precompute_features(other, out)
    assert files(out) == before


def test_other_weights_are_refused(cached_features, tmp_path):
    config, out = cached_features
    other = dataclasses.replace(config, model=str(changed_weights(Path(config.model), tmp_path / "model")))
    with pytest.raises(ConfigError, match=r"other settings than .* \(the weights of image_qformer differ\); use"):
        setup.plan_run(with_features(other, out))


def test_settings_that_do_not_affect_features_may_change(cached_features, tmp_path):
    config, out = cached_features
    moved = tmp_path / "renamed"
    shutil.copytree(config.datasets[0].path, moved)
    datasets = (dataclasses.replace(config.datasets[0], path=str(moved), holdout=1),)
    setup.plan_run(with_features(dataclasses.replace(config, datasets=datasets, batch_size=8, dropout=0.0), out))


def test_other_records_are_refused(cached_features, audio_records, tmp_path):
    config, out = cached_features
    other = config_of(config.model, audio_records, branch="audio")
    with pytest.raises(
        DataError, match=r"no features of the current content of .*records \(found features of records-\w+\)"
    ):
        setup.plan_run(with_features(other, out))
    with pytest.raises(DataError, match="none: feature cache not found; create it with `vllama features`"):
        setup.plan_run(with_features(config, tmp_path / "none"))


def test_a_run_can_use_fewer_variants_but_not_more(cached_features):
    config, out = cached_features
    assert setup.plan_run(with_features(config, out, variants=1)).reader.data.variants == 1
    with pytest.raises(ConfigError, match=r"has 2 variants of each record, but data.variants is 3; reduce it"):
        setup.plan_run(with_features(config, out, variants=3))
    with pytest.raises(ConfigError, match="variants was 2, now 3"):
        precompute_features(dataclasses.replace(config, data=dataclasses.replace(config.data, variants=3)), out)


def test_cached_components_cannot_be_trainable(cached_features):
    config, out = cached_features
    config = dataclasses.replace(config, trainable=(*config.trainable, "image_qformer/*"))
    with pytest.raises(ConfigError, match=r"'image_qformer/\*' matches image_qformer/.* read from data.feature_cache"):
        setup.plan_run(with_features(config, out))


def test_an_invalid_manifest_is_refused(cached_features, tmp_path):
    config, out = cached_features
    copy = tmp_path / "features"
    shutil.copytree(out, copy)
    (manifest,) = copy.glob("*/manifest.json")
    fields = json.loads(manifest.read_text())
    for content, what in (
        ("{", "not JSON"),
        (json.dumps({**fields, "format": 9}), "features of format 9, but this version reads 1"),
        (json.dumps({"format": 1}), "missing branch, dtype, encoders"),
    ):
        manifest.write_text(content)
        with pytest.raises(DataError, match=what):
            setup.plan_run(with_features(config, copy))


def test_records_that_all_fail_to_decode_are_an_error(tiny_model, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/0.mp4").write_bytes(b"\0\0\0\x18ftypmp42 and nothing of a video")
    paths = built(tmp_path / "clips", [{"video": "0.mp4", "caption": "nothing"}])
    with pytest.raises(DataError, match=r"none of 1 records can be decoded; the first: 0.mp4: "):
        precompute_features(config_of(tiny_model, paths), tmp_path / "features")


def test_an_unwritable_output_is_reported(cached_features, tmp_path):
    config, out = cached_features
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/features: cannot be written \(Not a directory\)"):
        precompute_features(config, tmp_path / "file/features")
    with pytest.raises(DataError, match=r"records: not a feature cache \(it has manifest.json\); choose another --out"):
        precompute_features(config, Path(config.datasets[0].path))
    with (
        pytest.raises(CheckpointError, match="another process is writing features there"),
        precompute._scratch_folder(out),
    ):
        precompute_features(config, out)


@pytest.mark.slow
def test_a_full_disk_is_reported(cached_features, tmp_path):
    config, out = cached_features
    copy = tmp_path / "features"
    shutil.copytree(out, copy)
    cache = open_cache(config, copy)
    cache.shard_path(0).unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            DataError, match=r"features-00000-of-00003.*: cannot be written \(.*File too large.*complete shards"
        ):
            precompute_features(config, copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(copy.glob(".partial*"))
    assert not cache.shard_path(0).exists()
    precompute_features(config, copy)
    assert files(copy) == files(out)


def write_config(path: Path, config: TrainConfig) -> Path:
    """Write the config as a Python file, as users do."""
    lines = ["from vllama_jax.config import *", "from vllama_jax.train.config import *", f"config = {config!r}"]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_features_command_prints_progress(cached_features, tmp_path, capsys):
    config, out = cached_features
    copy = tmp_path / "features"
    shutil.copytree(out, copy)
    open_cache(config, copy).shard_path(2).unlink()
    named = str(write_config(tmp_path / "config.py", config))
    main(["features", named, "--out", str(copy)])
    output = capsys.readouterr().out
    assert f"{copy}: 3 shards, " in output
    assert "2 from an earlier run; encoded 1 record, " in output
    assert "skipped 1 record (skipped-*.jsonl), first 2.mp4: " in output
    assert files(copy) == files(out)


def test_features_command_reports_wrong_arguments(cached_features, tmp_path):
    config, out = cached_features
    named = str(write_config(tmp_path / "config.py", config))
    for arguments, what in (
        (["no_stage", "--out", "x"], "no_stage: no such run config"),
        ([named, "--out", "x", "--model", "gone"], "gone: no such model directory"),
        ([named, "--out", "x", "--datasets.0.path", "gone"], "gone: no such records directory"),
        ([named, "--out", str(out), "--seed", "1"], r"other settings \(seed was 42, now 1\)"),
        ([named, "--out", str(out), "--shard-records", "5"], "shard_records was 4, now 5"),
    ):
        with pytest.raises(SystemExit, match=what):
            main(["features", *arguments])
    assert not Path("x").exists()


@SLOW
@pytest.mark.parametrize("variants", [1, 2])
@pytest.mark.parametrize("branch", ["vision", "audio"])
@pytest.mark.usefixtures("one_device")
def test_cached_losses_equal_live_losses(tiny_model, records, audio_records, tmp_path, branch, variants):
    paths = (records,) if branch == "vision" else (records, audio_records)
    steps = STEPS if branch == "vision" else 2 * STEPS
    config = config_of(tiny_model, *paths, branch=branch, variants=variants, dropout=0.1, steps=steps, batch_size=4)
    precompute_features(config, tmp_path / "features", shard_records=4)
    live, media_types, problems = losses(config)
    assert media_types == ({"video", "image"} if branch == "vision" else {"video", "image", "audio"})
    cached = losses(with_features(config, tmp_path / "features"))
    np.testing.assert_allclose(cached[0], live, rtol=1e-6)
    assert cached[1:] == (media_types, problems)


@SLOW
def test_killed_processes_resume_with_the_same_bytes(cached_features, tmp_path):
    config, out = cached_features
    named = str(write_config(tmp_path / "config.py", config))
    copy = tmp_path / "features"
    arguments = [VLLAMA, "features", named, "--out", str(copy), "--shard-records", "4"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    for delay in (0.0, 0.05, 0.2):
        process = subprocess.Popen(arguments, env=environment)
        while not list(copy.glob(".partial-0/*")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(arguments, env=environment, check=True)
    assert files(copy) == files(out)


@SLOW
def test_processes_at_different_speeds_write_the_same_bytes(cached_features, tmp_path):
    config, out = cached_features
    named = str(write_config(tmp_path / "config.py", config))
    copy = tmp_path / "features"
    code = (
        "import sys, time, jax; from vllama_jax.cli import main; jax.config.update('jax_num_cpu_devices', 4); "
        "jax.distributed.initialize('localhost:9918', 2, int(sys.argv[1])); "
        "from vllama_jax.train import precompute as features; finish = features._ShardFile.finish; "
        "features._ShardFile.finish = lambda self: (time.sleep(3 * int(sys.argv[1])), finish(self)); "
        "main(sys.argv[2:])"
    )
    arguments = ["features", named, "--out", str(copy), "--shard-records", "4"]
    processes = [subprocess.Popen([sys.executable, "-c", code, str(n), *arguments]) for n in (0, 1)]
    assert [process.wait() for process in processes] == [0, 0]
    assert files(copy).keys() == files(out).keys()
    cache, expected = open_cache(config, copy), open_cache(config, out)
    for record in (0, 1, 3, 4, 5, 6, 7, 8):
        np.testing.assert_allclose(cache.read(record, 1)[0], expected.read(record, 1)[0], rtol=1e-5, atol=1e-6)
