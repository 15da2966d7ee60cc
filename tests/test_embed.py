"""Features of media files: their values, the written file and its index, and resuming after an interruption."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_fixtures import VLLAMA, expect_error_line, expect_usage_error
from media_fixtures import tone, write_audio, write_video
from networks import random_network, tiny_on_small_images
from PIL import Image
from safetensors.numpy import load_file

from vllama_jax import cli
from vllama_jax.chat import prepare_media
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.embed import EmbedOptions, FileFeatures, embed_files, load_encoders, storage
from vllama_jax.embed.files import _make_batches, _make_chunks
from vllama_jax.embed.outputs import select_outputs
from vllama_jax.embed.storage import write_features
from vllama_jax.errors import CheckpointError, ConfigError, DataError
from vllama_jax.model import Model

ALL_OUTPUTS = {
    "frames",
    "imagebind_image",
    "imagebind_audio",
    "video_qformer",
    "audio_qformer",
    "video_tokens",
    "audio_tokens",
}
IMAGEBIND = EmbedOptions(features=("imagebind",), batch_size=8)  # a video of 8 frames is a batch


@pytest.fixture(scope="module")
def model() -> Model:
    config = tiny_on_small_images()
    return Model(config, tokenizer=None, network=jax.tree.map(jnp.asarray, random_network(config)))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A video with audio, an image, an audio file, a short video without audio, and a corrupt file."""
    folder = tmp_path_factory.mktemp("files")
    write_video(folder / "video.mp4", num_frames=50, waveform=tone(2.5, 16000))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "image.png")
    write_audio(folder / "audio.wav", tone(4, 16000), 16000, "pcm_s16le", "s16")
    write_video(folder / "short.mp4", num_frames=5)
    (folder / "corrupt.mp4").write_bytes(b"\0" * 1000)
    return {path.stem: path for path in folder.iterdir()}


def expected_arrays(model: Model, path: Path) -> dict[str, np.ndarray]:
    """Compute a file's features with the network's methods, one file at a time."""
    network, prepared = model.network, prepare_media(path, model.config)

    @jax.jit
    def run(network, frames, mel):
        found = {}
        if frames is not None:
            found["frames"] = network.encode_frames(frames)[0]
            found["imagebind_image"] = network.embed_frames(frames)[0]
            found["video_tokens"] = network.encode_video(frames)[0]
        if mel is not None:
            found["imagebind_audio"] = network.embed_audio(mel)[0]
            found["audio_tokens"] = network.encode_audio(mel)[0]
        return found

    frames, mel = (None if array is None else array[None] for array in (prepared.frames, prepared.mel))
    return {name: np.asarray(array) for name, array in run(network, frames, mel).items()}


@pytest.mark.parametrize(
    "names",
    [["corrupt", "video"], pytest.param(["video", "image", "corrupt", "audio", "short"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_features_equal_those_of_the_networks_methods(model, files, names):
    found = dict(zip(names, embed_files(model, [files[name] for name in names]), strict=True))
    assert found["corrupt"].arrays == {}
    assert str(files["corrupt"]) in found["corrupt"].error
    for name in {*names} - {"corrupt"}:
        arrays, expected = found[name].arrays, expected_arrays(model, files[name])
        qformers = {"video_qformer": "llama_proj", "audio_qformer": "audio_llama_proj"}
        assert arrays.keys() - qformers.keys() == expected.keys()
        for output, projection in qformers.items():
            if output in arrays:
                tokens = getattr(model.network, projection)(arrays[output])
                np.testing.assert_allclose(tokens, expected[output.replace("qformer", "tokens")], atol=2e-5)
        for output, values in expected.items():
            assert arrays[output].dtype == np.float32
            np.testing.assert_allclose(arrays[output], values, atol=2e-5, err_msg=f"{name}: {output}")
    assert found["video"].arrays.keys() == ALL_OUTPUTS
    assert "short" not in names or len(found["short"].arrays["frames"]) == 5


def test_times_of_frames_and_audio_clips(model, files):
    video, audio, image = embed_files(model, [files["video"], files["audio"], files["image"]], features=["imagebind"])
    np.testing.assert_allclose(video.timestamps, np.array([0, 6, 12, 18, 25, 31, 37, 43]) / 25, atol=1e-6)
    np.testing.assert_allclose(video.clip_starts, np.arange(8) * (video.clip_starts[1]), atol=1e-3)
    assert 0.5 / 8 <= video.clip_starts[1] < 0.6 / 8  # AAC pads the 2.5 s
    assert audio.clip_starts == (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75)
    assert audio.timestamps == image.timestamps == image.clip_starts == ()


@pytest.mark.parametrize(
    ("lengths", "batches"),
    [
        ([(8, 8), (8, 8), (8, 8)], [[0, 1], [2]]),  # frames and audio clips of each file, 16 at a time
        ([(1, 0)] * 17, [list(range(16)), [16]]),
        ([(0, 8), (8, 0), (0, 8), (8, 0), (1, 0)], [[0, 1, 2, 3], [4]]),
        ([(1, 0), (40, 8), (1, 0)], [[0], [1], [2]]),
        ([(0, 0)] * 20, [list(range(16)), list(range(16, 20))]),  # files that cannot be used
    ],
)
def test_a_batch_has_at_most_batch_size_frames_and_audio_clips(lengths, batches):
    decoded = [
        (FileFeatures(str(number)), {"frames": np.zeros(frames), "mel": np.zeros(clips)})
        for number, (frames, clips) in enumerate(lengths)
    ]
    assert [[int(record.file) for record, _ in batch] for batch in _make_batches(decoded, 16)] == batches


@pytest.mark.parametrize(
    ("count", "size", "shape"), [(1, 64, (1, 1)), (9, 64, (1, 16)), (60, 60, (1, 60)), (7, 3, (3, 3))]
)
def test_frames_are_padded_to_few_shapes(count, size, shape):
    chunks = _make_chunks(np.arange(1, count + 1), size)
    assert chunks.shape == shape
    np.testing.assert_array_equal(chunks.reshape(-1)[:count], np.arange(1, count + 1))
    assert not chunks.reshape(-1)[count:].any()


@pytest.mark.slow
def test_more_items_than_the_batch_size_are_encoded_in_chunks(model, files):
    """Three frames at a time of a video of eight, and each file's features are its own."""
    order = [files["short"], files["video"], files["image"]]
    whole = list(embed_files(model, order, features=["imagebind"]))
    chunked = list(embed_files(model, order, features=["imagebind"], batch_size=3))
    for one, other in zip(whole, chunked, strict=True):
        np.testing.assert_allclose(other.arrays["imagebind_image"], one.arrays["imagebind_image"], atol=1e-5)


def test_features_are_selected(model, files):
    (found,) = embed_files(model, [files["video"]], features=["imagebind"], audio=False)
    assert found.arrays.keys() == {"imagebind_image"}
    assert found.report.audio == "off"
    (found,) = embed_files(model, [files["audio"]], features=["frames"])
    assert found.error == f"{files['audio']}: only audio, which has no frames; choose other features"


def test_a_model_without_audio_has_no_imagebind(model):
    config = dataclasses.replace(model.config, audio_qformer=None, imagebind=None)
    assert {output.name for output in select_outputs(config, ())} == {"frames", "video_qformer", "video_tokens"}
    with pytest.raises(ConfigError, match="the model has no imagebind; choose from frames, qformer, tokens"):
        select_outputs(config, ("imagebind",))


def test_frames_of_another_size_have_no_imagebind_vectors(model):
    """ImageBind would get frames that it was not trained on."""
    config = dataclasses.replace(model.config, vit=dataclasses.replace(model.config.vit, image_size=28))
    assert "imagebind_image" in {output.name for output in select_outputs(model.config, ())}
    assert "imagebind_image" not in {output.name for output in select_outputs(config, ())}


def test_more_frames_than_positions_have_only_features_of_frames(model, files):
    count = model.config.num_frame_positions + 1
    (found,) = embed_files(model, [files["video"]], features=["imagebind"], num_frames=count)
    assert len(found.arrays["imagebind_image"]) == count
    with pytest.raises(ConfigError, match=f"num_frames {count}, but the model has"):
        embed_files(model, [files["video"]], num_frames=count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ["clip"]}, "'clip' is not one of frames, qformer, tokens, imagebind"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"num_frames": 0}, "num_frames must be at least 1, not 0"),
    ],
)
def test_options_are_checked_before_files_are_read(model, options, message):
    with pytest.raises(ConfigError, match=message):
        embed_files(model, ["missing.mp4"], **options)


def test_only_the_needed_components_are_loaded(tiny_model):
    network = load_encoders(tiny_model, ["imagebind"]).network
    assert not any(hasattr(network, name) for name in ("llama", "vit", "image_qformer", "audio_qformer"))
    assert hasattr(network.imagebind, "audio")
    network = load_encoders(tiny_model, ["frames"]).network
    assert not any(hasattr(network, name) for name in ("llama", "imagebind", "video_qformer"))


# The written file.


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


# Interruptions.


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
    assert "name at least one file" in expect_usage_error("embed", *map(str, required))
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dog_image", "birthday", "boat", "dog_barking"])
def test_imagebinds_vectors_equal_the_originals(golden, golden_model, shared, name):
    """From the file to the vector. The original's audio clips change each other where they overlap (D-062)."""
    path = shared / "media" / ("dog.jpg" if name == "dog_image" else f"{name}.mp4")
    (found,) = embed_files(load_encoders(golden_model, ["imagebind"]), [path], features=["imagebind"])
    references = {"imagebind_image": f"{name}_imagebind_vision.npz", "imagebind_audio": f"{name}_audio.npz"}
    compared = [output for output, file in references.items() if (golden / "encoders" / file).exists()]
    assert compared
    for output in compared:
        vectors = found.arrays[output]
        expected = np.load(golden / "encoders" / references[output])["imagebind_finalout"].reshape(vectors.shape)
        if output == "imagebind_image":
            np.testing.assert_allclose(vectors, expected, atol=2e-5 * np.abs(expected).max())
        else:
            np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 20, rtol=1e-5)
            assert (np.sum(vectors * expected, axis=-1) / 400).min() > 0.99999


@pytest.mark.slow
def test_audio_is_most_similar_to_the_image_of_its_object(tmp_path):
    """The example of docs/usage.md on the miniature, which was not trained on these combinations."""
    from vllama_jax.miniature.scene import KINDS, draw_scene
    from vllama_jax.miniature.world import make_generator, write_image, write_wav

    number = 0
    while len(found := {path.stem for path in tmp_path.iterdir()}) < len(KINDS):
        rng, number = make_generator(0, "usage", number), number + 1
        scene = draw_scene(rng, "rests", "test")
        if (kind := scene.objects[0].kind) not in found:
            write_image(tmp_path / f"{kind}.jpg", scene, rng)
            write_wav(tmp_path / f"{kind}.wav", scene, rng)
    model = load_encoders("miniature", ["imagebind"])
    vectors = {}
    for suffix, output in (("jpg", "imagebind_image"), ("wav", "imagebind_audio")):
        records = embed_files(model, [tmp_path / f"{kind}.{suffix}" for kind in KINDS], features=["imagebind"])
        means = np.stack([record.arrays[output].mean(axis=0) for record in records])
        vectors[suffix] = means / np.linalg.norm(means, axis=1, keepdims=True)
    correct = (vectors["wav"] @ vectors["jpg"].T).argmax(axis=1) == np.arange(len(KINDS))
    assert correct.sum() >= 12
