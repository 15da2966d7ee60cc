"""All layouts of weight files are read, and dimensions come from the files, the presets and --config."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import convert_command, convert_files, drop_components, plan, read_hashes, read_leaves, to_bytes
from safetensors.numpy import load_file, save_file
from written_weights import LAYOUTS

import vllama_jax as vl
from vllama_jax import convert
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli import main
from vllama_jax.config import RopeScaling, VideoLlamaConfig, tiny
from vllama_jax.convert import torch_files, weight_files
from vllama_jax.convert.infer_config import PUBLISHED_HEADS, infer_model_config
from vllama_jax.convert.language_config import read_llama_config
from vllama_jax.convert.tiny import write_tiny

# The language model's layouts.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_language_model_is_the_same_from_every_layout(tiny_files, tiny_model, tmp_path, layout):
    directory = shutil.copytree(tiny_files["llama"], tmp_path / "llama")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    LAYOUTS[layout](tensors, directory)
    convert.convert(plan(tiny_files | {"llama": directory}), tmp_path / "model")
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)


def test_remapped_torch_files_give_the_same_weights(tiny_files, tiny_model, tmp_path, monkeypatch):
    paths = write_tiny(tmp_path / "files", format="pth")
    loads = []
    monkeypatch.setattr(torch_files, "REMAP_BYTES", 20_000)
    monkeypatch.setattr(
        torch, "load", lambda *args, load=torch.load, **options: loads.append(1) or load(*args, **options)
    )
    convert.convert(plan(paths), tmp_path / "model")
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)
    assert len(loads) > 20


def test_safetensors_whose_header_begins_as_a_pickle_does(tmp_path):
    path, tensors = tmp_path / "model.safetensors", {"weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    for padding in range(0, 256, 8):
        save_file(tensors, path, metadata={"note": "x" * padding})
        if path.read_bytes()[:1] == b"\x80":
            break
    opened = weight_files.open_weight_file(path)
    assert isinstance(opened, weight_files.SafetensorsFile)
    np.testing.assert_array_equal(opened.read("weight"), tensors["weight"])


def test_parameters_and_views_are_read_as_tensors(tmp_path):
    held = {"learns": torch.nn.Parameter(torch.ones(3)), "turned": torch.arange(6.0).reshape(2, 3).T}
    torch.save(held | {"half": torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16).T}, tmp_path / "file.pth")
    source = weight_files.open_file(tmp_path / "file.pth")
    assert source.read("learns").tolist() == [1, 1, 1]
    assert source.read("turned").tolist() == [[0, 3], [1, 4], [2, 5]]
    assert source.read("half").astype(np.float32).tolist() == [[1, 3], [2, 4]]


def variant(**llama) -> VideoLlamaConfig:
    config = tiny()
    return dataclasses.replace(config, llama=dataclasses.replace(config.llama, **llama))


def test_embedding_rows_beyond_the_tokenizers_are_kept(tmp_path):
    leaves = convert_files(write_tiny(tmp_path / "files", config=variant(vocab_size=514)), tmp_path / "model")
    assert (leaves["llama/embedding"].shape, leaves["llama/head/kernel"].shape) == ((514, 64), (64, 514))


@pytest.mark.parametrize("head_in_file", [False, True])
def test_tied_embeddings_have_no_head(tmp_path, head_in_file):
    paths = write_tiny(tmp_path / "files", config=variant(tie_embeddings=True))
    if head_in_file:
        tensors = load_file(paths["llama"] / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        save_file(tensors, paths["llama"] / "model.safetensors")
    planned = plan(paths)
    assert planned.config.llama.tie_embeddings
    assert "llama/head/kernel" not in {leaf.rule.target for leaf in planned.leaves}
    assert any("the head is tied" in reason for reason in planned.left_out) == head_in_file


def test_mixed_half_precisions_become_float32(tiny_files, tmp_path):
    tensors = load_file(tiny_files["eva_vit"])
    tensors["blocks.0.norm1.weight"] = tensors["blocks.0.norm1.weight"].astype(np.float16)
    tensors["blocks.1.norm1.weight"] = tensors["blocks.1.norm1.weight"].astype("bfloat16")
    tensors["blocks.2.norm1.weight"] = tensors["blocks.2.norm1.weight"].astype(np.float16)
    save_file(tensors, tmp_path / "eva.safetensors")
    leaf = convert_files(tiny_files | {"eva_vit": tmp_path / "eva.safetensors"}, tmp_path / "model")[
        "vit/blocks/norm1/scale"
    ]
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf[1], tensors["blocks.1.norm1.weight"].astype(np.float32))


# Combinations of components.


def test_vision_language_projection_has_priority_over_minigpt4(tiny_files, tmp_path, capsys):
    main(convert_command(tiny_files, tmp_path / "model"))
    projection = load_file(tiny_files["vl"])["llama_proj.bias"]
    assert to_bytes(read_leaves(tmp_path / "model")["llama_proj/bias"]) == to_bytes(projection)
    assert f"skipped 2 tensors of {tiny_files['minigpt4']}: --vl has its own projection" in capsys.readouterr().out


def test_minigpt4_projection_is_used_without_a_vision_language_checkpoint(tiny_files, tmp_path):
    leaves = convert_files(drop_components(tiny_files, "vl"), tmp_path / "model")
    assert to_bytes(leaves["llama_proj/bias"]) == to_bytes(load_file(tiny_files["minigpt4"])["llama_proj.bias"])


def test_one_file_with_both_branches_serves_for_both(tiny_files, tiny_model, tmp_path, capsys):
    save_file(load_file(tiny_files["vl"]) | load_file(tiny_files["al"]), tmp_path / "both.safetensors")
    both = dict.fromkeys(("vl", "al"), tmp_path / "both.safetensors")
    main(convert_command(tiny_files | both, tmp_path / "model"))
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)
    assert "both.safetensors" not in capsys.readouterr().out


def test_the_other_branch_in_a_checkpoint_is_reported(tiny_files, tmp_path):
    save_file(load_file(tiny_files["vl"]) | load_file(tiny_files["al"]), tmp_path / "both.safetensors")
    planned = plan(drop_components(tiny_files, "al") | {"vl": tmp_path / "both.safetensors"})
    assert any("give the file as --al too" in reason for reason in planned.left_out)


def test_vision_only_model_is_complete(tiny_files, tmp_path):
    convert.convert(plan(drop_components(tiny_files, "imagebind", "al", "minigpt4")), tmp_path / "model")
    assert not vl.load(tmp_path / "model").config.has_audio


def test_load_refuses_a_base_without_trained_branches(tiny_files, tmp_path, capsys):
    main(convert_command(drop_components(tiny_files, "vl", "minigpt4"), tmp_path / "model"))
    assert ": train them, or convert" in capsys.readouterr().out
    with pytest.raises(vl.CheckpointError, match=r"the model has no frame_positions, llama_proj, video_qformer "):
        vl.load(tmp_path / "model")


def test_a_model_without_a_trained_audio_branch_answers_and_reports_that_audio_is_unused(tiny_files, tmp_path, caplog):
    main(convert_command(drop_components(tiny_files, "al"), tmp_path / "model"))
    assert not vl.load(tmp_path / "model").config.has_audio
    assert "the audio branch has no trained weights" in caplog.text


# Dimensions.


def other_in_every_number() -> VideoLlamaConfig:
    scaling = RopeScaling(kind="linear", factor=2.0)
    config = variant(num_kv_heads=4, rope_theta=5e5, rope_scaling=scaling, max_length=4096, norm_eps=1e-5, depth=2)
    return dataclasses.replace(
        config,
        vit=dataclasses.replace(config.vit, image_size=96, patch_size=16, depth=2, mlp_dim=80),
        video_qformer=dataclasses.replace(config.video_qformer, depth=4, num_queries=64),
        audio_qformer=dataclasses.replace(config.audio_qformer, depth=1, num_queries=4, mlp_dim=32),
        imagebind=dataclasses.replace(config.imagebind, embed_dim=24),
        num_frame_positions=64,
        num_clip_positions=16,
    )


@pytest.mark.parametrize("config", [tiny(), tiny(audio=False), other_in_every_number()])
def test_dimensions_are_inferred_from_the_files(tmp_path, config):
    paths = write_tiny(tmp_path / "files", config=config)
    if config.llama.rope_scaling:
        fields = json.loads((paths["llama"] / "config.json").read_text())
        fields["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
        (paths["llama"] / "config.json").write_text(json.dumps(fields))
    assert plan(paths).config == config


@pytest.mark.parametrize(
    ("width", "blocks", "config_fields", "depth"),
    [
        (1408, 40, {}, 39),  # the preset's depth
        (1408, 45, {}, 39),
        (1408, 39, {}, 39),
        (1408, 40, {"vit": {"depth": 5}}, 5),
        (64, 6, {}, 5),  # all but the last layer
        (64, 6, {"vit": {"depth": 6}}, 6),
    ],
)
def test_eva_depth_is_inferred(tiny_files, tmp_path, width, blocks, config_fields, depth):
    tensors = {f"blocks.{number}.norm1.weight": np.ones(1) for number in range(blocks)}
    tensors |= {"patch_embed.proj.weight": np.ones((width, 3, 2, 2)), "pos_embed": np.ones((1, 5, width))}
    save_file(tensors | {"blocks.0.mlp.fc1.weight": np.ones((8, 1))}, tmp_path / "eva.safetensors")
    files = {"eva_vit": tmp_path / "eva.safetensors", "blip2": tiny_files["blip2"]}
    files = {kind: weight_files.open_file(path) for kind, path in files.items()}
    files["llama"] = weight_files.open_llama(tiny_files["llama"])
    heads = {part: {"num_heads": 4} for part in ("image_qformer", "video_qformer")} | {"vit": {"num_heads": 4}}
    config_fields = {**heads, "vit": heads["vit"] | config_fields.get("vit", {})}
    assert infer_model_config(files, read_llama_config(tiny_files["llama"]), config_fields).vit.depth == depth


def test_head_counts_of_the_published_widths_are_known():
    heads = {"vit": {1408: 16}, "qformer": {768: 12}, "imagebind.audio": {768: 12}, "imagebind.vision": {1280: 16}}
    assert heads == PUBLISHED_HEADS


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, (10000.0, None)),
        ({"rope_theta": 500000.0}, (500000.0, None)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}, (1000.0, None)),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, (10000.0, {"kind": "linear", "factor": 4.0})),
        (
            {
                "rope_theta": 500000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            (
                500000.0,
                {
                    "kind": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_length": 8192,
                },
            ),
        ),
    ],
)
def test_rotary_settings_of_every_transformers_version(tiny_files, tmp_path, rope, expected):
    fields = json.loads((tiny_files["llama"] / "config.json").read_text())
    del fields["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(fields | rope))
    read = read_llama_config(tmp_path)
    assert (read["rope_theta"], read["rope_scaling"]) == expected


# Options.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_on_disk(tmp_path, dtype):
    paths = write_tiny(tmp_path / "files", half=True)
    leaves = convert_files(paths, tmp_path / "model", dtype=dtype)
    assert {leaf.dtype.name for leaf in leaves.values()} == {dtype}
    stored = load_file(paths["llama"] / "model.safetensors")["model.norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(leaves["llama/norm/scale"], stored.astype(dtype))


def test_template_flag_has_priority_over_the_config(tiny_files):
    config_fields = json.loads(tiny_files["config"].read_text())
    assert plan(tiny_files, config=config_fields | {"template": "plain"}).config.template == "plain"
    assert (
        plan(tiny_files, config=config_fields | {"template": "plain"}, template="llama_2").config.template == "llama_2"
    )


def test_progress_adds_up_to_all_bytes(tiny_files, tmp_path):
    planned, written = plan(tiny_files), []
    convert.convert(planned, tmp_path / "model", dtype="float16", progress=written.append)
    assert sum(written) == convert.bytes_to_write(planned, "float16")


def test_paths_with_spaces_a_relative_out_and_missing_parents(tiny_files, tiny_model, tmp_path, monkeypatch):
    for kind, path in tiny_files.items():
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, tmp_path / f"the {kind} é{path.suffix}")
    named = {kind: Path(f"the {kind} é{path.suffix}") for kind, path in tiny_files.items()}
    monkeypatch.chdir(tmp_path)
    main(convert_command(named, Path("some where/new/model")))
    assert read_hashes(tmp_path / "some where/new/model") == read_hashes(tiny_model)


def test_manifest_names_the_sources(tiny_files, tiny_model):
    described = open_model(tiny_model).manifest["sources"]
    assert described["vl"] == [{"name": "vl.safetensors", "size": tiny_files["vl"].stat().st_size}]
    assert described["llama"][0]["name"] == "model.safetensors"


# The command that writes tiny files.


@pytest.mark.slow
def test_tiny_files_are_written_and_converted_without_torch(tmp_path, tiny_files, tiny_model):
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = functools.partial(subprocess.run, check=True, env=environment, cwd=tmp_path)
    run([sys.executable, "-m", "vllama_jax.convert.tiny", "files"])
    paths = {kind: Path("files", path.relative_to(tiny_files["config"].parent)) for kind, path in tiny_files.items()}
    run([sys.executable, "-c", "from vllama_jax.cli import main; main()", *convert_command(paths, Path("model"))])
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--out", "x"], 2), (["a", "b"], 2), (["{tmp}"], 1)])
def test_tiny_command_reports_errors(tmp_path, capsys, arguments, code):
    from vllama_jax.convert import tiny

    with pytest.raises(SystemExit) as stopped:
        tiny.main([argument.format(tmp=tmp_path) for argument in arguments])
    if code == 2:
        assert (stopped.value.code, capsys.readouterr().err) == (2, "usage: python -m vllama_jax.convert.tiny DIR\n")
    else:
        assert stopped.value.code == f"vllama: {tmp_path}: already exists; remove it or choose another path"
