"""Exported weights equal the imported ones bit for bit, in files that PyTorch code and transformers load."""

import dataclasses
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN_HEADS
from conversions import drop_components, plan, read_hashes, read_leaves, read_torch_tensors, to_bytes
from safetensors.torch import load_file
from torch_weights import ImageBindReference
from transformers import LlamaForCausalLM
from written_runs import flat_state, random_leaves, vision_stage1_config, write_run

from vllama_jax import convert
from vllama_jax.checkpoints import arrays
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.config import LoraConfig, RopeScaling, tiny, video_llama_7b
from vllama_jax.convert import export
from vllama_jax.convert.export import EXPORT_SHARD_BYTES, ExportFormat
from vllama_jax.convert.tiny import write_tiny
from vllama_jax.model import load
from vllama_jax.nn.llama import rope_frequencies

FILES = {
    "eva_vit": "eva_vit_g.pth",
    "blip2": "blip2.pth",
    "imagebind": "imagebind.pth",
    "vl": "vl.pth",
    "al": "al.pth",
    "minigpt4": "minigpt4.pth",
    "llama": "llama",
}
OTHER_TOWERS = r"(audio_encoder\.)?modality_\w+\.(text|depth|thermal|imu)\..*"
ALL = LoraConfig(rank=3, alpha=6.0, targets=("query", "key", "value", "out", "gate", "up", "down"))


def exported(model: Path, out: Path, format: ExportFormat = "pth", shard_bytes: float = EXPORT_SHARD_BYTES) -> Path:
    directory = open_model(model)
    export.export(directory, export.plan_export(directory, format, shard_bytes), out)
    return out


def imported(exported_files: Path, out: Path, **options) -> Path:
    """Convert exported files with their own config.json."""
    paths = {kind: exported_files / name for kind, name in FILES.items() if (exported_files / name).exists()}
    convert.convert(plan(paths, config=json.loads((exported_files / "config.json").read_text()), **options), out)
    return out


def llama_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name


# Golden: the original's own files.

LLAMAS = ("llama-bin", "llama-st", "llama-v0pad")
STYLE = "videollama2_style/{}_LLaMA_2_7B_Finetuned.pth"
GOLDEN_SETS = {
    **{llama: {"llama": llama} for llama in LLAMAS},
    "videollama2_style": {"vl": STYLE.format("VL"), "al": STYLE.format("AL")},
}
# Tensors of the golden files that the model does not use. The file of a branch is complete.
NOT_USED = {
    "eva_vit": r"(blocks\.3|norm|head)\..*",
    "blip2": r"t5_proj\..*",
    "imagebind": OTHER_TOWERS,
    "llama": r".*\.rotary_emb\.inv_freq",
}


SETS = [pytest.param(name, marks=[pytest.mark.slow] * (name in ("llama-bin", "llama-st"))) for name in GOLDEN_SETS]


@pytest.fixture(scope="module", params=SETS)
def golden_set(request, golden, golden_files) -> dict[str, Path]:
    """Each of the golden weight directories, with the other components."""
    return golden_files | {kind: golden / "weights" / name for kind, name in GOLDEN_SETS[request.param].items()}


@pytest.mark.slow
def test_golden_comes_back_bit_for_bit(golden_set, tmp_path):
    convert.convert(plan(golden_set, config=GOLDEN_HEADS), tmp_path / "model")
    exported_files = exported(tmp_path / "model", tmp_path / "exported")
    for kind, name in FILES.items():
        found = llama_tensors(exported_files / name) if kind == "llama" else read_torch_tensors(exported_files / name)
        expected = golden_tensors(golden_set[kind])
        if kind == "minigpt4":  # --vl has its own projection, which is the one that the model uses
            expected = {name: golden_tensors(golden_set["vl"])[name] for name in expected}
        used = {name for name in expected if not re.fullmatch(NOT_USED.get(kind, ""), name)}
        assert found.keys() == used, kind
        for name in used:
            assert_equal(found[name], expected[name], name)
    assert read_hashes(imported(exported_files, tmp_path / "again")) == read_hashes(tmp_path / "model")


def golden_tensors(path: Path) -> dict[str, torch.Tensor]:
    return llama_tensors(path) if list(path.glob("*.safetensors")) else read_torch_tensors(path)


@pytest.mark.parametrize("branch", ["vl", "al"])
def test_golden_branches_have_the_originals_keys(golden, golden_model, tmp_path, branch):
    recorded = json.loads((golden / "checkpoint_keys.json").read_text())[f"finetune_{branch}.pth"]["model"]
    held = torch.load(exported(golden_model, tmp_path / "made") / f"{branch}.pth")
    assert held.keys() == {"model"}
    found = {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in held["model"].items()}
    assert found == {name: [shape, dtype] for name, (shape, dtype, _) in recorded.items()}


def test_golden_in_one_file_has_the_whole_models_keys(golden, golden_model, tmp_path):
    full = json.loads((golden / "tiny_model_state_dict_shapes.json").read_text())
    needed = {name for name, (*_, what) in full.items() if what == "buffer" or not re.fullmatch(OTHER_TOWERS, name)}
    found = load_file(exported(golden_model, tmp_path / "made", "safetensors") / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in found.items()} == {name: full[name][0] for name in needed}


# Formats.


@pytest.fixture(scope="module")
def tiny_export(tiny_model, tmp_path_factory) -> Path:
    return exported(tiny_model, tmp_path_factory.mktemp("export") / "made")


def test_one_file_holds_what_the_many_hold(tiny_model, tiny_export, tmp_path):
    flat_state = load_file(exported(tiny_model, tmp_path / "flat", "safetensors") / "model.safetensors")
    prefixes = {"eva_vit": "visual_encoder.", "imagebind": "audio_encoder.", "llama": "llama_model."}
    for kind, file in FILES.items():
        tensors = llama_tensors(tiny_export / file) if kind == "llama" else read_torch_tensors(tiny_export / file)
        for name, tensor in tensors.items():
            assert_equal(flat_state.pop(prefixes.get(kind, "") + name, tensor), tensor, name)
    assert not flat_state
    assert sorted(path.name for path in (tmp_path / "flat").iterdir()) == ["config.json", "model.safetensors"]


def test_torch_files_are_as_torch_writes_them(tiny_export):
    """Complete zip files whose tensors are aligned as torch aligns them, so that they can be memory-mapped."""
    for file in tiny_export.glob("*.pth"):
        held = torch.load(file, mmap=True, weights_only=True)
        assert held.keys() == {"model"} or file.name in ("eva_vit_g.pth", "imagebind.pth")
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
        for name, tensor in held.get("model", held).items():
            assert tensor.is_contiguous(), name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
            assert tensor.data_ptr() % 64 == 0, name


def test_imagebind_loads_into_its_two_towers(tiny_export):
    reference = ImageBindReference(tiny().imagebind)
    assert not reference.load_state_dict(torch.load(tiny_export / "imagebind.pth")).missing_keys


ROPES = {
    "none": None,
    "linear": RopeScaling(kind="linear", factor=2.0),
    "llama3": RopeScaling(kind="llama3", factor=8.0, low_freq_factor=2.0, high_freq_factor=5.0, original_max_length=64),
}


@pytest.mark.parametrize(("rope", "tied"), [("none", False), ("linear", True), ("llama3", False)])
@pytest.mark.parametrize("shard_bytes", [EXPORT_SHARD_BYTES, 100_000])
def test_transformers_loads_the_language_model(tmp_path, rope, tied, shard_bytes):
    llama = dataclasses.replace(tiny().llama, rope_scaling=ROPES[rope], tie_embeddings=tied, rope_theta=5e5)
    paths = write_tiny(tmp_path / "files", config=dataclasses.replace(tiny(audio=False), llama=llama), half=True)
    convert.convert(plan(paths), tmp_path / "model")
    exported_files = exported(tmp_path / "model", tmp_path / "made", shard_bytes=shard_bytes) / "llama"
    shards = [file.stat().st_size for file in exported_files.glob("*.safetensors")]
    assert len(shards) == 1 if shard_bytes == EXPORT_SHARD_BYTES else max(shards) < shard_bytes + 5000
    loaded, problems = LlamaForCausalLM.from_pretrained(exported_files, dtype="auto", output_loading_info=True)
    assert not any(problems.values())
    state = loaded.state_dict()
    for name, tensor in load_file(paths["llama"] / "model.safetensors").items():
        assert_equal(state[name], tensor, name)
    np.testing.assert_allclose(loaded.model.rotary_emb.inv_freq, rope_frequencies(llama), rtol=1e-6)
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (1, 2)
    assert (exported_files / "tokenizer.model").read_bytes() == (paths["llama"] / "tokenizer.model").read_bytes()
    converted_again = open_model(imported(tmp_path / "made", tmp_path / "again"))
    assert converted_again.config == open_model(tmp_path / "model").config
    assert read_hashes(tmp_path / "again") == read_hashes(tmp_path / "model")


def test_special_ids_are_the_language_models_own(tiny_model, tmp_path):
    """tokenizer.json needs its config.json, which may list several EOS tokens."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "tokenizer/config.json").write_text('{"eos_token_id": [2, 5], "pad_token_id": 7, "hidden_size": 3}')
    fields = json.loads((exported(model, tmp_path / "made") / "llama/config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["pad_token_id"]) == (1, [2, 5], 7)
    assert (fields["hidden_size"], fields["torch_dtype"]) == (64, "float32")


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_frequencies_are_torchs_to_the_bit(theta):
    llama = dataclasses.replace(video_llama_7b().llama, rope_theta=theta)
    assert to_bytes(rope_frequencies(llama)) == to_bytes(
        (1.0 / (theta ** (torch.arange(0, llama.head_dim, 2).float() / llama.head_dim))).numpy()
    )


# Combinations of components, and chunk layouts on disk.


@pytest.mark.slow
def test_chunks_are_put_together(tmp_path, monkeypatch):
    """Weights with all layers in one file, and with several files for each layer."""
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 9000)
    monkeypatch.setattr(arrays, "SINGLE_FILE_BYTES", 3000)
    paths = write_tiny(tmp_path / "files", half=True, format="pth")
    convert.convert(plan(paths), tmp_path / "model")
    layers = tmp_path / "model/params/image_qformer.cross_layers.mlp_norm.scale"
    matrix = tmp_path / "model/params/image_qformer.cross_layers.mlp.up.kernel"
    assert (len(list(layers.iterdir())), len(list(matrix.iterdir())) > 5) == (2, True)  # one of them is .zarray
    exported_files = exported(tmp_path / "model", tmp_path / "made")
    for kind in ("eva_vit", "blip2", "imagebind", "vl", "al"):
        held = read_torch_tensors(paths[kind])
        for name, tensor in read_torch_tensors(exported_files / FILES[kind]).items():
            if name in held:
                assert_equal(tensor, held[name], name)
    assert read_hashes(imported(exported_files, tmp_path / "again")) == read_hashes(tmp_path / "model")


@pytest.mark.parametrize(
    ("lacking", "absent"),
    [
        (("vl", "al"), {"vl.pth", "al.pth"}),
        (("vl", "al", "minigpt4"), {"vl.pth", "al.pth", "minigpt4.pth"}),
        (("imagebind", "al"), {"imagebind.pth", "al.pth"}),
    ],
)
def test_parts_that_the_model_lacks_have_no_file(tiny_files, tmp_path, lacking, absent):
    convert.convert(plan(drop_components(tiny_files, *lacking)), tmp_path / "model")
    exported_files = exported(tmp_path / "model", tmp_path / "made")
    assert {path.name for path in exported_files.iterdir()} == {"config.json", *FILES.values()} - absent
    assert read_hashes(imported(exported_files, tmp_path / "again")) == read_hashes(tmp_path / "model")


# Trained weights.


@pytest.mark.slow
def test_what_a_run_trained_comes_back_and_the_rest_is_its_bases(tiny_files, tmp_path):
    """The base has no branches: the run has all of their weights."""
    convert.convert(plan(drop_components(tiny_files, "vl", "al")), tmp_path / "base")
    trained = random_leaves(tiny(), LoraConfig(), "video_qformer", "frame_positions", "llama_proj")
    run = write_run(vision_stage1_config(tmp_path / "base", LoraConfig()), tmp_path / "run", trained)
    exported_files = exported(run, tmp_path / "made")
    assert not (exported_files / "al.pth").exists()
    leaves, before = read_leaves(imported(exported_files, tmp_path / "again")), read_leaves(tmp_path / "base")
    assert leaves.keys() == before.keys() | trained.keys()
    for path, leaf in leaves.items():
        assert to_bytes(leaf) == to_bytes(trained.get(path, before.get(path))), path
    queries = torch.load(exported_files / "vl.pth")["model"]["video_query_tokens"]
    assert to_bytes(queries[0].numpy()) == to_bytes(trained["video_qformer/queries"])


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_low_rank_updates_are_merged_as_loading_merges_them(tmp_path, half):
    convert.convert(plan(write_tiny(tmp_path / "files", half=half)), tmp_path / "base")
    trained = random_leaves(tiny(vocab_size=512), ALL, "frame_positions")
    run = write_run(vision_stage1_config(tmp_path / "base", ALL), tmp_path / "run", trained)
    leaves = read_leaves(imported(exported(run, tmp_path / "made"), tmp_path / "again"))
    before, moved = read_leaves(tmp_path / "base"), 0
    for path, leaf in leaves.items():
        update = path.replace("/kernel", "/lora/")
        if f"{update}down" in trained:
            sides = (trained[f"{update}down"], trained[f"{update}up"])
            product = np.stack([np.tensordot(down, up, 1) for down, up in zip(*sides, strict=True)])
            expected = (before[path].astype(np.float32) + 2.0 * product).astype(leaf.dtype)
            assert leaf.dtype == before[path].dtype
            np.testing.assert_allclose(
                leaf.astype(np.float32), expected.astype(np.float32), rtol=1e-2 if half else 1e-6
            )
            moved += 1
        else:
            assert to_bytes(leaf) == to_bytes(trained.get(path, before[path])), path
    assert moved == len(ALL.targets)
    loaded, converted_again = (dict(flat_state(load(path).network)) for path in (run, tmp_path / "again"))
    for path, variable in loaded.items():
        np.testing.assert_allclose(
            variable[...], converted_again[path][...], atol=5e-3 if half else 1e-6, err_msg=str(path)
        )
