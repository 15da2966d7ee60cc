"""A new model from an existing one: new components, branches from runs, and unchanged copies of all others."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversions import convert_command, drop_components, expect_one_line, read_hashes, read_leaves, to_bytes
from flax import nnx
from safetensors.numpy import load_file, save_file

import vllama_jax as vl
from vllama_jax.checkpoints import arrays
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli import main
from vllama_jax.config import LoraConfig, tiny
from vllama_jax.convert.tiny import write_tiny
from vllama_jax.data.config import DatasetConfig
from vllama_jax.train.config import CheckpointConfig, TrainConfig
from vllama_jax.train.run_directory import Checkpoints, open_run
from vllama_jax.train.state import TrainState

VL, AL = ("video_qformer", "frame_positions", "llama_proj"), ("audio_qformer", "audio_positions", "audio_llama_proj")
LORA = LoraConfig(rank=2, alpha=3.0, targets=("query", "out"))


def other_files(tmp_path: Path, **options) -> dict[str, Path]:
    return write_tiny(tmp_path / "other", seed=1, **options)


def make_run(
    out: Path, base: Path, components: tuple[str, ...], lora: LoraConfig | None = None
) -> dict[str, np.ndarray]:
    """Write a run directory as training does; return the new values of all weights of these components."""
    held = open_model(base)
    shapes = {path: shape for path, shape in held.shapes.items() if path.split("/")[0] in components}
    for name in lora.targets if lora else ():
        layers, *sides = held.shapes[f"llama/blocks/attention/{name}/kernel"]
        inputs = 2 if name == "out" else 1
        shapes[f"llama/blocks/attention/{name}/lora/down"] = (layers, *sides[:inputs], lora.rank)
        shapes[f"llama/blocks/attention/{name}/lora/up"] = (layers, lora.rank, *sides[inputs:])
    rng = np.random.default_rng(len(out.name))
    trained = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    config = TrainConfig(
        model=str(base),
        datasets=(DatasetConfig(path="records"),),
        steps=3,
        batch_size=1,
        **({"lora": lora} if lora else {}),
    )
    with open_run(out, config, held, "float32", {}):
        checkpoints = Checkpoints(out, CheckpointConfig())
        opt_state = {"count": jnp.zeros(())}
        checkpoints.save(3, TrainState(jnp.int32(3), jax.tree.map(jnp.asarray, trained), opt_state))
        checkpoints.finish()
    return trained


def component_hashes(model: Path, components: tuple[str, ...]) -> dict[str, str]:
    return {path: value for path, value in read_hashes(model).items() if path.split("/")[0] in components}


# One component replaced.

PARTS = {
    "eva_vit": ("vit",),
    "blip2": ("ln_vision", "image_qformer"),
    "imagebind": ("imagebind",),
    "vl": VL,
    "al": AL,
    "minigpt4": ("llama_proj",),
    "llama": ("llama",),
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_new_component_replaces_only_itself(tiny_files, tiny_model, tmp_path, kind):
    other = other_files(tmp_path)
    main(convert_command(other, tmp_path / "whole"))
    main(convert_command({kind: other[kind]}, tmp_path / "model", "--base", str(tiny_model)))
    result, old, new = read_hashes(tmp_path / "model"), read_hashes(tiny_model), read_hashes(tmp_path / "whole")
    if kind == "minigpt4":
        new = read_hashes(tiny_model) | {
            f"llama_proj/{name}": result[f"llama_proj/{name}"] for name in ("kernel", "bias")
        }
        assert to_bytes(read_leaves(tmp_path / "model")["llama_proj/bias"]) == to_bytes(
            load_file(other[kind])["llama_proj.bias"]
        )
    assert result == {path: (new if path.split("/")[0] in PARTS[kind] else old)[path] for path in old}
    assert result != old
    assert open_model(tmp_path / "model").config == open_model(tiny_model).config


def test_kept_components_are_the_same_bytes(tiny_files, tiny_model, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(arrays, "iter_row_blocks", lambda *_: read.append(1))
    main(convert_command({"vl": tiny_files["vl"]}, tmp_path / "model", "--base", str(tiny_model)))
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)
    assert not read
    for file in (file for file in tiny_model.rglob("*") if file.is_file() and file.name != "manifest.json"):
        copy = tmp_path / "model" / file.relative_to(tiny_model)
        assert copy.read_bytes() == file.read_bytes()
        assert not copy.samefile(file)


def test_manifest_records_the_source_of_each_component(tiny_files, tiny_model, tmp_path):
    main(convert_command({"vl": other_files(tmp_path)["vl"]}, tmp_path / "model", "--base", str(tiny_model)))
    sources, old = (open_model(model).manifest["sources"] for model in (tmp_path / "model", tiny_model))
    assert sources.pop("base") == [{"name": tiny_model.name, "digest": open_model(tiny_model).digest}]
    assert sources == old


def test_kept_components_can_change_dtype(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "SINGLE_FILE_BYTES", 100)
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 5000)  # chunks divided along every axis, with partial ones
    main(convert_command({}, tmp_path / "half", "--base", str(tiny_model), "--dtype", "float16"))
    main(convert_command({}, tmp_path / "model", "--base", str(tmp_path / "half"), "--dtype", "float32"))
    before, after = read_leaves(tiny_model), read_leaves(tmp_path / "model")
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf.astype(np.float16).astype(np.float32))


def test_the_template_stays_unless_another_is_given(tiny_model, tmp_path):
    main(convert_command({}, tmp_path / "one", "--base", str(tiny_model), "--template", "llama_2"))
    main(convert_command({}, tmp_path / "two", "--base", str(tmp_path / "one")))
    assert open_model(tmp_path / "two").config.template == "llama_2"


def test_an_audio_branch_can_be_added_to_a_vision_only_model(tiny_files, tiny_model, tmp_path):
    main(convert_command(drop_components(tiny_files, "imagebind", "al", "minigpt4"), tmp_path / "sees"))
    audio = {kind: tiny_files[kind] for kind in ("imagebind", "al", "config")}
    main(convert_command(audio, tmp_path / "hears", "--base", str(tmp_path / "sees")))
    assert read_hashes(tmp_path / "hears") == read_hashes(tiny_model)


def test_a_checkpoint_of_another_size_changes_the_config(tiny_model, tmp_path):
    config = tiny()
    larger = dataclasses.replace(config.video_qformer, num_queries=64, depth=4)
    other = other_files(tmp_path, config=dataclasses.replace(config, video_qformer=larger, num_frame_positions=16))
    main(convert_command({"vl": other["vl"]}, tmp_path / "model", "--base", str(tiny_model)))
    result = open_model(tmp_path / "model").config
    assert result == dataclasses.replace(config, video_qformer=larger, num_frame_positions=16)


def test_components_that_do_not_fit_the_base_are_listed(tiny_model, tmp_path):
    config = tiny()
    other = other_files(tmp_path, config=dataclasses.replace(config, llama=dataclasses.replace(config.llama, width=48)))
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main(convert_command({"llama": other["llama"]}, out, "--base", str(tiny_model)))
    assert stopped.value.code.splitlines() == [
        "vllama: the shapes of components do not match:",
        f"  {tiny_model}: audio_llama_proj/bias is [64], but [48] is needed",
        f"  {tiny_model}: audio_llama_proj/kernel is [48, 64], but [48, 48] is needed",
        f"  {tiny_model}: llama_proj/bias is [64], but [48] is needed",
        f"  {tiny_model}: llama_proj/kernel is [48, 64], but [48, 48] is needed",
        "  to train new weights of the needed shapes, add --without audio_llama_proj llama_proj",
    ]
    assert not out.exists()


def test_buffers_are_compared_with_the_base(tiny_files, tiny_model, tmp_path):
    name = "audio_encoder.modality_postprocessors.audio.1.log_logit_scale"
    save_file(load_file(tiny_files["al"]) | {name: np.ones((), np.float32)}, tmp_path / "al.safetensors")
    with pytest.raises(SystemExit, match=f"differs in {tmp_path}/al.safetensors: {re.escape(name)} has other values"):
        main(convert_command({"al": tmp_path / "al.safetensors"}, tmp_path / "model", "--base", str(tiny_model)))


def manifest(**entry):
    """Change the manifest's entry of one weight."""

    def change(base: Path) -> None:
        fields = json.loads((base / "manifest.json").read_text())
        fields["leaves"]["vit/positions"] |= entry
        (base / "manifest.json").write_text(json.dumps(fields))

    return change


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (manifest(shape=[-1, 64]), "vit/positions: invalid shape [-1, 64]"),
        (manifest(shape="all"), "vit/positions: invalid shape 'all'"),
        (manifest(dtype="object"), "vit/positions: unsupported dtype 'object'"),
        (manifest(dtype=["float32"]), "vit/positions: unsupported dtype ['float32']"),
        (lambda base: shutil.rmtree(base / "params" / "vit.positions"), "vit.positions: cannot be read (No such file"),
        (lambda base: (base / "params" / "vit.positions" / "0.0").unlink(), "vit.positions/0.0: missing"),
        (lambda base: (base / "params" / "vit.positions" / "0.0").write_bytes(b"x"), "has 1 bytes instead of 65792"),
        (lambda base: (base / "params" / "vit.positions" / ".zarray").write_text("{}"), "does not match manifest.json"),
        (lambda base: (base / "manifest.json").unlink(), "not a model directory (no manifest.json in it)"),
        (lambda base: (base / "tokenizer" / "tokenizer.model").unlink(), "no tokenizer in"),
        (lambda base: shutil.rmtree(base), "no such model directory"),
    ],
)
def test_a_corrupt_base_is_one_line(tiny_files, tiny_model, tmp_path, corrupt, message):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    corrupt(base)
    assert message in expect_one_line({"vl": tiny_files["vl"]}, tmp_path, "--base", str(base))


def test_an_audio_checkpoint_needs_imagebind_in_the_base(tiny_files, tmp_path):
    main(convert_command(drop_components(tiny_files, "imagebind", "al", "minigpt4"), tmp_path / "sees"))
    text = expect_one_line({"al": tiny_files["al"]}, tmp_path, "--base", str(tmp_path / "sees"))
    assert text == "vllama: --al needs --imagebind, which encodes the input of the audio branch"


# Runs.


@pytest.mark.slow
def test_two_runs_and_their_base_are_merged(tiny_model, tmp_path):
    vision_leaves, audio_leaves = (
        make_run(tmp_path / "vision", tiny_model, VL),
        make_run(tmp_path / "sound", tiny_model, AL),
    )
    runs = {"vl": tmp_path / "vision", "al": tmp_path / "sound"}
    main(convert_command(runs, tmp_path / "model", "--base", str(tiny_model)))
    leaves = read_leaves(tmp_path / "model")
    for path, expected in (read_leaves(tiny_model) | vision_leaves | audio_leaves).items():
        np.testing.assert_array_equal(leaves.pop(path), expected)
    assert not leaves
    sources = open_model(tmp_path / "model").manifest["sources"]
    assert [sources[kind][0]["name"] for kind in ("base", "vl", "al")] == ["model", "vision", "sound"]


@pytest.mark.slow
def test_a_run_can_be_based_on_a_run(tiny_model, tmp_path):
    first = make_run(tmp_path / "first", tiny_model, VL)
    second = make_run(tmp_path / "second_", tmp_path / "first", ("llama_proj",))
    main(convert_command({}, tmp_path / "flat", "--base", str(tmp_path / "second_")))
    main(convert_command({"vl": tmp_path / "second_"}, tmp_path / "joined", "--base", str(tiny_model)))
    for result in ("flat", "joined"):
        leaves = read_leaves(tmp_path / result)
        for path, expected in (read_leaves(tiny_model) | first | second).items():
            np.testing.assert_array_equal(leaves[path], expected)
    assert read_hashes(tmp_path / "flat") == read_hashes(tmp_path / "joined")


@pytest.mark.slow
def test_a_run_provides_its_full_branch_and_everything_it_trained(tiny_files, tiny_model, tmp_path, capsys):
    main(convert_command(other_files(tmp_path), tmp_path / "base"))
    vision_leaves = make_run(tmp_path / "run", tmp_path / "base", ("llama_proj", "ln_vision"))
    main(convert_command({"vl": tmp_path / "run"}, tmp_path / "model", "--base", str(tiny_model)))
    leaves, base, other = (read_leaves(path) for path in (tmp_path / "model", tiny_model, tmp_path / "base"))
    for path, leaf in leaves.items():
        home = vision_leaves if path in vision_leaves else other if path.split("/")[0] in VL else base
        np.testing.assert_array_equal(leaf, home[path])
    components = "image_qformer, imagebind/audio, imagebind/vision, llama, vit"
    text = f"{tmp_path}/run: was trained with another {components} than that of {tiny_model}"
    assert text in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_of_both_branches_gives_one_or_both(tiny_model, tmp_path):
    both = make_run(tmp_path / "run", tiny_model, (*VL, *AL))
    main(convert_command({"vl": tmp_path / "run"}, tmp_path / "one", "--base", str(tiny_model)))
    main(convert_command({"vl": tmp_path / "run", "al": tmp_path / "run"}, tmp_path / "two", "--base", str(tiny_model)))
    assert component_hashes(tmp_path / "one", AL) == component_hashes(tiny_model, AL)
    leaves = read_leaves(tmp_path / "two")
    for path, expected in both.items():
        np.testing.assert_array_equal(leaves[path], expected)


@pytest.mark.slow
def test_a_branch_of_a_run_can_be_combined_with_files(tiny_files, tiny_model, tmp_path):
    vision_leaves = make_run(tmp_path / "run", tiny_model, VL)
    main(convert_command(tiny_files | {"vl": tmp_path / "run"}, tmp_path / "model"))
    leaves = read_leaves(tmp_path / "model")
    for path, expected in (read_leaves(tiny_model) | vision_leaves).items():
        np.testing.assert_array_equal(leaves[path], expected)


@pytest.mark.slow
def test_lora_updates_are_merged_as_load_merges_them(tiny_model, tmp_path):
    make_run(tmp_path / "run", tiny_model, VL, LORA)
    main(convert_command({"vl": tmp_path / "run"}, tmp_path / "model", "--base", str(tiny_model)))
    merged, loaded = vl.load(tmp_path / "model"), vl.load(tmp_path / "run")
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(merged.network)), jax.tree.leaves(nnx.state(loaded.network)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    changed = {
        path for path, value in read_hashes(tmp_path / "model").items() if value != read_hashes(tiny_model)[path]
    }
    assert {path for path in changed if path.startswith("llama/")} == {
        "llama/blocks/attention/query/kernel",
        "llama/blocks/attention/out/kernel",
    }


def test_a_run_whose_base_has_moved_is_merged_into_the_given_base(tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    make_run(tmp_path / "run", base, VL)
    base.rename(tmp_path / "moved")
    main(convert_command({"vl": tmp_path / "run"}, tmp_path / "model", "--base", str(tmp_path / "moved")))
    assert component_hashes(tmp_path / "model", AL) == component_hashes(tiny_model, AL)


def test_runs_that_cannot_be_merged_are_refused(tiny_files, tiny_model, tmp_path):
    make_run(tmp_path / "vision", tiny_model, (*VL, "ln_vision"))
    make_run(tmp_path / "sound", tiny_model, (*AL, "ln_vision"))
    shutil.copytree(tmp_path / "vision", tmp_path / "empty", ignore=shutil.ignore_patterns("step_*"))
    moved = shutil.copytree(tmp_path / "vision", tmp_path / "gone")
    fields = json.loads((moved / "config.json").read_text())
    fields["base"]["path"] = "/nowhere"
    (moved / "config.json").write_text(json.dumps(fields))
    main(convert_command(drop_components(tiny_files, "vl", "minigpt4"), tmp_path / "bare"))
    base = ("--base", str(tiny_model))
    both = {"vl": tmp_path / "vision", "al": tmp_path / "sound"}
    refused = {
        "both trained ln_vision/bias; give only one of the two": (both, *base),
        "trained ln_vision/bias, which a given file contains too": (both | {"blip2": tiny_files["blip2"]}, *base),
        "empty: the run has no checkpoint yet": ({"vl": tmp_path / "empty"}, *base),
        "gone: its base model /nowhere was not found": (tiny_files | {"vl": moved},),
        "bare: given as --vl, but has no trained vision branch": ({"vl": tmp_path / "bare"}, *base),
    }
    for message, (paths, *more) in refused.items():
        assert message in expect_one_line(paths, tmp_path, *more)
        (tmp_path / "out").rmdir()
