"""A vision tower and a branch from outside of the package: with table entries, all of the package supports them."""

import dataclasses
import json

import extension_motion
import extension_siglip
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conversions import drop_components, plan, read_leaves
from flax import nnx
from networks import random_network
from PIL import Image
from train_fixtures import ONE, RecordingReporter, config_of
from transformers import SiglipVisionConfig, SiglipVisionModel

import vllama_jax as vl
from vllama_jax import convert
from vllama_jax.branches import BRANCHES
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.checkpoints.quantize import abstract_layers
from vllama_jax.config import QFormerConfig, from_json, tiny, to_json
from vllama_jax.convert import export
from vllama_jax.convert.components import FILE_SPECS
from vllama_jax.convert.tiny import write_tiny
from vllama_jax.convert.verify.layers import BOUNDS, VerifySettings, compare_networks
from vllama_jax.convert.verify.weights import compare_weights
from vllama_jax.errors import ConfigError
from vllama_jax.memory import estimate
from vllama_jax.towers import TOWERS
from vllama_jax.train.config import MeshConfig
from vllama_jax.train.loop import train
from vllama_jax.train.precompute import precompute_features

SIGLIP = extension_siglip.SiglipConfig(image_size=32, patch_size=16, width=64, depth=2, num_heads=4, mlp_dim=96)
MOTION = extension_motion.MotionConfig(
    encoder=extension_motion.MotionTowerConfig(image_size=32, patch_size=16, width=24),
    qformer=QFormerConfig(width=48, depth=2, num_heads=extension_motion.HEADS, mlp_dim=64, num_queries=5),
    num_positions=8,
)


def add_entries(patch: pytest.MonkeyPatch) -> None:
    """Register the tower and the branch: entries of three tables."""
    patch.setitem(TOWERS, extension_siglip.SiglipConfig, extension_siglip.TOWER)
    patch.setitem(TOWERS, extension_motion.MotionTowerConfig, extension_motion.TOWER)
    patch.setitem(BRANCHES, "motion", extension_motion.BRANCH)
    patch.setitem(FILE_SPECS, "siglip", extension_siglip.FILE_SPEC)
    patch.setitem(FILE_SPECS, "motion", extension_motion.FILE_SPEC)


with pytest.MonkeyPatch.context() as entries:
    add_entries(entries)
    EXTENDED = dataclasses.replace(tiny(audio=False), vit=SIGLIP, extra_branches=(MOTION,))


@pytest.fixture
def extension(monkeypatch):
    """Register the entries for one test."""
    add_entries(monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random PyTorch files of the extended model."""
    with pytest.MonkeyPatch.context() as patch:
        add_entries(patch)
        return write_tiny(tmp_path_factory.mktemp("extended") / "files", config=EXTENDED)


@pytest.fixture(scope="module")
def model(files, tmp_path_factory):
    """A model directory converted from them. Read-only."""
    with pytest.MonkeyPatch.context() as patch:
        add_entries(patch)
        out = tmp_path_factory.mktemp("extended") / "model"
        convert.convert(plan(drop_components(files, "minigpt4")), out)
        return out


@pytest.mark.slow
def test_siglip_equals_transformers(extension, tmp_path):
    """Random weights, converted with the rules; all of them are used."""
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            image_size=32,
            patch_size=16,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in theirs.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * (0.5 if weight.ndim < 2 else 0.1)
    prefix = "" if any(name.startswith("vision_model.") for name in theirs.state_dict()) else "vision_model."
    tensors = {prefix + name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    ours = extension_siglip.SiglipVit(SIGLIP, rngs=nnx.Rngs(0))
    state = nnx.state(ours)
    flat = {"vit/" + "/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    rules = extension_siglip.rules(SIGLIP)
    assert {rule.target for rule in rules} == flat.keys()
    for rule in rules:
        rows = [rule.transform.to_jax(*(tensors[name] for name in names)) for names in rule.names()]
        flat[rule.target].set_value(jnp.asarray(rows[0] if rule.layers is None else np.stack(rows)))
    nnx.update(ours, state)
    frames = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(frames).permute(0, 3, 1, 2)).last_hidden_state.numpy()
    np.testing.assert_allclose(jax.jit(ours)(frames), expected, atol=2e-5)


def test_config_json_names_the_types_and_round_trips(extension):
    fields = json.loads(to_json(EXTENDED))
    assert fields["vit"]["type"] == "siglip"
    assert [branch["type"] for branch in fields["extra_branches"]] == ["motion"]
    assert from_json(to_json(EXTENDED)) == EXTENDED


def test_unregistered_types_are_a_one_line_error():
    with pytest.raises(ConfigError, match=r"config.vit.type: unknown vision tower 'siglip'; known types: none"):
        from_json(to_json(EXTENDED))
    fields = json.loads(to_json(EXTENDED)) | {"vit": json.loads(to_json(tiny()))["vit"]}
    with pytest.raises(ConfigError, match=r"extra_branches.0.type: unknown branch 'motion'; known types: none"):
        from_json(json.dumps(fields))


def test_a_branch_reads_the_frames_of_the_model_in_a_chat(extension):
    larger = dataclasses.replace(MOTION, encoder=dataclasses.replace(MOTION.encoder, image_size=64))
    with pytest.raises(ConfigError, match="motion and vit need frames of different size, mean or std"):
        dataclasses.replace(EXTENDED, extra_branches=(larger,))


def test_frames_are_normalized_for_the_tower_of_the_model(extension, clip):
    prepared = vl.media_tokens.prepare_media(clip, EXTENDED, audio=False)
    raw = vl.media.read_video(clip, EXTENDED.num_frames, SIGLIP.image_size, audio=False).frames
    np.testing.assert_allclose(prepared.frames, (raw / 255 - 0.5) / 0.5, atol=1e-6)


@pytest.mark.slow
def test_conversion_infers_the_config_and_export_gives_the_same_files_back(extension, files, model, tmp_path):
    directory = open_model(model)
    assert directory.config == EXTENDED
    assert {"vit", "motion"} <= {path.split("/")[0] for path in directory.shapes}
    assert not any(path.startswith(("imagebind", "audio")) for path in directory.shapes), "what it does not have"
    planned = export.plan_export(directory)
    assert {"siglip.pth", "motion.pth"} <= planned.keys()
    assert not {"eva_vit_g.pth", "imagebind.pth", "al.pth"} & planned.keys()
    export.export(directory, planned, tmp_path / "exported")
    again = {kind: tmp_path / "exported" / f"{kind}.pth" for kind in ("siglip", "blip2", "vl", "motion")}
    again |= {"llama": tmp_path / "exported" / "llama", "config": tmp_path / "exported" / "config.json"}
    convert.convert(plan(again), tmp_path / "again")
    before, after = read_leaves(model), read_leaves(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)


@pytest.mark.slow
def test_verify_compares_every_layer_of_the_tower(extension, files, model):
    planned = plan(drop_components(files, "minigpt4"))
    errors, _ = compare_networks(open_model(model), planned, VerifySettings(tokens=16), lambda *_: None)
    assert [error.layer for error in errors if error.component == "vit"] == ["patches", "layer 0", "layer 1", "norm"]
    assert max(error.relative for error in errors) < BOUNDS["float32"].relative
    assert all(not part.different for part in compare_weights(open_model(model), planned))


def test_files_of_two_towers_are_refused(extension, files, tiny_files):
    with pytest.raises(ConfigError, match="--eva-vit and SigLIP vision weights contain the same component"):
        plan(drop_components(files, "minigpt4") | {"eva_vit": tiny_files["eva_vit"]})
    with pytest.raises(ConfigError, match="every model needs --eva-vit or SigLIP vision weights"):
        plan(drop_components(files, "minigpt4", "siglip"))


@pytest.mark.slow
def test_the_branch_trains_from_records_and_from_features_and_its_run_answers(
    extension, model, image_records, clip, tmp_path
):
    config = config_of(
        model,
        image_records,
        branch="motion",
        trainable=extension_motion.BRANCH.trainable,
        steps=2,
        batch_size=8,
        mesh=ONE,
    )
    reporter = RecordingReporter()
    train(config, tmp_path / "run", reporter)
    assert [np.isfinite(step["loss"]) for step in reporter.steps] == [True, True]
    trained = open_model(tmp_path / "run").trained[-1].leaves
    assert {path.rsplit("/", 1)[0].split("/")[0] for path in trained} == {"motion"}
    assert not any(path.startswith("motion/encoder") for path in trained), "the encoder is frozen"

    precompute_features(
        dataclasses.replace(config, data=dataclasses.replace(config.data, variants=1)), tmp_path / "features"
    )
    cached = dataclasses.replace(
        config, data=dataclasses.replace(config.data, feature_cache=str(tmp_path / "features"))
    )
    reporter = RecordingReporter()
    train(cached, tmp_path / "cached", reporter)
    assert len(reporter.steps) == 2

    chat = vl.Chat(vl.load(tmp_path / "run"))
    chat.add(clip)
    tokens = EXTENDED.video_qformer.num_queries + MOTION.qformer.num_queries
    assert [len(media_tokens) for media_tokens in chat._tokens] == [tokens]
    assert isinstance("".join(chat.ask("What is it?", max_new_tokens=2)), str)


@pytest.mark.slow
def test_a_chat_prompt_has_the_tokens_of_both_branches(extension):
    network = jax.tree.map(jnp.asarray, random_network(EXTENDED))
    assert [branch.name for branch in network.branches] == ["vision", "motion"]
    frames = np.random.default_rng(0).standard_normal((3, 32, 32, 3), np.float32)
    prepared = vl.media_tokens.PreparedMedia(
        vl.MediaReport("clip", "video", 3, 1.0, "absent"), frames, None, (0.0, 0.1, 0.2)
    )
    (tokens,) = vl.media_tokens.encode_media(network, prepared)
    vision_tokens = jax.jit(lambda network, x: network.encode_video(x))(network, frames[None])[0]
    motion = jax.jit(lambda network, x: network.motion.tokens(network.motion.encode(x)))(network, frames[None])[0]
    np.testing.assert_allclose(tokens, np.concatenate([vision_tokens, motion]), atol=1e-5)


@pytest.mark.slow
def test_features_of_files_have_the_tokens_of_the_branch(extension, tmp_path):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "image.png")
    model = vl.Model(EXTENDED, tokenizer=None, network=jax.tree.map(jnp.asarray, random_network(EXTENDED)))
    (found,) = vl.embed_files(model, [tmp_path / "image.png"])
    assert found.arrays.keys() == {"frames", "video_qformer", "video_tokens", "motion_tokens"}
    frames = vl.media_tokens.prepare_media(tmp_path / "image.png", EXTENDED).frames
    motion = jax.jit(lambda network, x: network.motion.tokens(network.motion.encode(x)))(model.network, frames[None])[0]
    np.testing.assert_allclose(found.arrays["motion_tokens"], motion, atol=1e-5)


def test_kernels_of_the_tower_are_quantized(extension):
    _, layers = abstract_layers(EXTENDED, "float32", "int8")
    vit = {path.removeprefix("vit/blocks/") for path in layers if path.startswith("vit/")}
    assert vit == {"attention/qkv", "attention/out", "mlp/up", "mlp/down"}


def test_memory_is_estimated_for_the_branch_and_for_a_chat(extension):
    device, mesh = estimate.DEVICES["H100"], MeshConfig(data=1)
    config = config_of("model", "records", branch="motion", trainable=extension_motion.BRANCH.trainable, batch_size=8)
    need = estimate.estimate_training(EXTENDED, "motion", config, mesh, device)
    sizes = {"motion/encoder", "llama"} & need.device.keys()
    assert sizes == {"motion/encoder", "llama"}
    assert "vit" not in need.device, "a run of the branch does without it"
    estimate_chat = estimate.estimate_chat(EXTENDED, mesh, device)
    assert {"vit", "motion/encoder", "motion/qformer"} <= estimate_chat.device.keys()
