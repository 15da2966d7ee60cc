"""Features of media files: their values, and which are computed."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from media_fixtures import write_media
from networks import random_network, tiny_on_small_images

from vllama_jax.embed import FileFeatures, embed_files, load_encoders
from vllama_jax.embed.files import _make_batches, _make_chunks
from vllama_jax.embed.outputs import select_outputs
from vllama_jax.errors import ConfigError
from vllama_jax.media_tokens import prepare_media
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


@pytest.fixture(scope="module")
def model() -> Model:
    config = tiny_on_small_images()
    return Model(config, tokenizer=None, network=jax.tree.map(jnp.asarray, random_network(config)))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return write_media(tmp_path_factory.mktemp("files"))


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


@pytest.mark.slow
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
    """The example of docs/embeddings.md on the miniature, which was not trained on these combinations."""
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
