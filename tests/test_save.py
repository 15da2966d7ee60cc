"""`vllama_jax.save`: a model in memory becomes a model directory, bit-exactly, complete or absent."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversions import read_hashes
from flax import nnx

import vllama_jax as vl
from vllama_jax.checkpoints import save as saving
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli import main
from vllama_jax.config import LoraConfig
from vllama_jax.io import atomic
from vllama_jax.nn.lora import add_lora, merge_lora


def arrays(model: vl.Model) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model.network))
    return {"/".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in flat}


def assert_same(one: vl.Model, other: vl.Model) -> None:
    ours, theirs = arrays(one), arrays(other)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        assert array.dtype == theirs[path].dtype
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)
    assert one.config == other.config
    assert one.tokenizer.encode("Which bell rings?") == other.tokenizer.encode("Which bell rings?")


@pytest.mark.slow
def test_saved_weights_are_those_of_the_directory_stacked_or_not(tiny_model, tmp_path):
    for stacked in (True, False):
        vl.save(vl.load(tiny_model, "float32", stacked=stacked), tmp_path / str(stacked))
        assert read_hashes(tmp_path / str(stacked)) == read_hashes(tiny_model)
    result = open_model(tmp_path / "True")
    assert result.config == open_model(tiny_model).config
    assert result.manifest["sources"] == {"saved": [{"name": "vllama_jax.save"}]}
    main(["verify", str(tmp_path / "True")])


@pytest.mark.slow
def test_a_model_in_bfloat16_keeps_its_dtype(tiny_model, tmp_path):
    model = vl.load(tiny_model, "bfloat16")
    vl.save(model, tmp_path / "model")
    assert {leaf["dtype"] for leaf in open_model(tmp_path / "model").manifest["leaves"].values()} == {"bfloat16"}
    assert_same(model, vl.load(tmp_path / "model", "bfloat16"))


@pytest.mark.slow
def test_a_model_on_a_mesh_can_be_saved(tiny_model, tmp_path):
    mesh = vl.sharding.make_mesh(data=4, tensor=2)
    vl.save(vl.load(tiny_model, "float32", mesh), tmp_path / "model")
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_a_quantized_model_answers_and_its_weights_stay_quantized(tiny_model, tmp_path, scheme):
    model = vl.load(tiny_model, quantize=scheme)
    vl.save(model, tmp_path / "model")
    assert open_model(tmp_path / "model").quantized == scheme
    assert_same(model, vl.load(tmp_path / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
def test_lora_updates_are_merged_into_their_kernels(tiny_model, tmp_path, stacked):
    def with_updates() -> vl.Model:
        model = vl.load(tiny_model, "float32", stacked=True)
        add_lora(model.network.llama, LoraConfig(rank=2, targets=("query", "out")), rngs=nnx.Rngs(0))
        for name in ("query", "out"):
            up = getattr(model.network.llama.blocks.attention, name).lora.up
            up.set_value(jax.random.normal(jax.random.key(1), up.shape))
        return model

    model, merged = with_updates(), with_updates()
    merge_lora(merged.network.llama)
    if not stacked:
        model.network.llama.unstack("cpu")
    vl.save(model, tmp_path / "model")
    saved = vl.load(tmp_path / "model", "float32", stacked=True)
    assert read_hashes(tmp_path / "model") != read_hashes(tiny_model)
    for path, array in arrays(merged).items():
        np.testing.assert_allclose(arrays(saved)[path], array, rtol=0 if stacked else 1e-6, atol=0 if stacked else 1e-6)


@pytest.mark.slow
def test_an_existing_directory_is_replaced_only_when_asked_and_only_if_it_is_a_model(tiny_model, tmp_path):
    model = vl.load(tiny_model, "float32")
    vl.save(model, tmp_path / "model")
    with pytest.raises(vl.CheckpointError, match="already exists"):
        vl.save(model, tmp_path / "model")
    (tmp_path / "model" / "stale").touch()
    vl.save(model, tmp_path / "model", overwrite=True)
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "manifest.json", "params", "tokenizer"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").touch()
    with pytest.raises(vl.CheckpointError, match="home: exists and is not a model directory"):
        vl.save(model, tmp_path / "home", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(vl.CheckpointError, match="link: a symbolic link"):
        vl.save(model, tmp_path / "link", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["home", "link", "model"]
    assert (tmp_path / "home" / "precious").exists()


@pytest.mark.slow
def test_a_model_is_saved_over_the_directory_that_it_was_loaded_from(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    model = vl.load(tmp_path / "model", "float32")
    model.network.llama_proj.bias.set_value(model.network.llama_proj.bias[...] + 1)
    vl.save(model, tmp_path / "model", overwrite=True)
    assert_same(model, vl.load(tmp_path / "model", "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_save_that_fails_leaves_what_was_there(tiny_model, tmp_path, monkeypatch, overwrite):
    model = vl.load(tiny_model, "float32")
    if overwrite:
        shutil.copytree(tiny_model, tmp_path / "model")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_manifest", full)
    with pytest.raises(vl.CheckpointError, match=r"model: cannot be written \(No space left on device\)"):
        vl.save(model, tmp_path / "model", overwrite=overwrite)
    assert os.listdir(tmp_path) == (["model"] if overwrite else [])
    if overwrite:
        assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)


def test_a_directory_renamed_by_a_killed_process_is_restored(tmp_path):
    (tmp_path / ".model.replaced").mkdir()
    (tmp_path / ".model.replaced" / "old").touch()
    with pytest.raises(vl.CheckpointError, match="cannot be written"), atomic.replacement_directory(tmp_path / "model"):
        raise OSError(28, "No space left on device")
    assert [str(file.relative_to(tmp_path)) for file in sorted(tmp_path.rglob("*"))] == ["model", "model/old"]
    with atomic.replacement_directory(tmp_path / "model") as directory:
        (directory / "new").touch()
    assert [str(file.relative_to(tmp_path)) for file in sorted(tmp_path.rglob("*"))] == ["model", "model/new"]


def test_an_incomplete_model_is_refused(tiny_model, tmp_path):
    model = vl.load(tiny_model, "float32")
    model.network.extra = nnx.Param(jnp.zeros(3))
    del model.network.llama_proj
    model.network.frame_positions.set_value(jnp.zeros((5, model.config.image_qformer.width)))
    with pytest.raises(vl.CheckpointError) as refused:
        vl.save(model, tmp_path / "model")
    assert str(refused.value) == (
        "the network cannot be saved as a model: extra: not in a model with its config; llama_proj/bias, "
        "llama_proj/kernel: missing; frame_positions: shape does not match its config"
    )
    assert not list(tmp_path.iterdir())


def test_a_missing_tokenizer_is_reported(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "gone")
    model = vl.load(tmp_path / "gone", "float32")
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(vl.CheckpointError, match=r"the tokenizer's files are no longer in .*/gone/tokenizer"):
        vl.save(model, tmp_path / "model")
    kernel = model.network.llama_proj.kernel
    kernel.set_value(kernel[...].astype(jnp.complex64))
    with pytest.raises(vl.CheckpointError, match="llama_proj/kernel: dtype complex64 cannot be stored"):
        vl.save(model, tmp_path / "model")
