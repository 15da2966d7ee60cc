"""`vllama verify`: accepts a correct model, and reports where an incorrect one differs."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_fixtures import expect_error_line, run_vllama
from conversions import convert_files, drop_components
from safetensors.numpy import load_file, save_file

from vllama_jax import cli
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.convert.verify.layers import make_jax_runner
from vllama_jax.model import load
from vllama_jax.nn.video_llama import VideoLlama

Tensors = dict[str, np.ndarray]


def run(capsys, *arguments: object) -> str:
    cli.main(["verify", *map(str, arguments)])
    return capsys.readouterr().out


def verify_error(capsys, *arguments: object) -> tuple[str, str]:
    """Return the one-line error of the command, and its output before."""
    return expect_error_line("verify", *arguments), capsys.readouterr().out


def options(paths: Mapping[str, Path]) -> list[object]:
    return [component for kind, path in paths.items() for component in (f"--{kind.replace('_', '-')}", path)]


def edited(path: Path, out: Path, change: Callable[[Tensors], None]) -> Path:
    """Copy a safetensors file, or the directory of one, with other tensors."""
    file = path / "model.safetensors" if path.is_dir() else path
    tensors = load_file(file)
    change(tensors)
    copy = out / path.name
    if path.is_dir():
        shutil.copytree(path, copy)
        save_file(tensors, copy / "model.safetensors")
    else:
        save_file(tensors, copy)
    return copy


def copied(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "model")


# Files


def flip_a_byte(model: Path, leaf: str) -> None:
    chunk = next(file for file in (model / "params" / leaf.replace("/", ".")).iterdir() if file.name != ".zarray")
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)


def test_verify_accepts_intact_files(tiny_model, capsys):
    assert run(capsys, tiny_model) == f"{tiny_model}: 181 arrays, 3.5 MB, intact\n"
    assert json.loads(run(capsys, tiny_model, "--json")) == {"weights": 181, "bytes": 3517588, "corrupt": {}}


def test_one_flipped_bit_is_detected(tiny_model, tmp_path, capsys):
    model = copied(tiny_model, tmp_path)
    flip_a_byte(model, "llama/blocks/mlp/up/kernel")
    message, _ = verify_error(capsys, model)
    assert message == (
        f"{model}: corrupt: llama/blocks/mlp/up/kernel (its content has changed since it was written); "
        "copy or convert it again"
    )


def test_missing_and_truncated_chunks_are_detected(tiny_model, tmp_path, capsys):
    model = copied(tiny_model, tmp_path)
    (model / "params/llama.norm.scale/0").unlink()
    file = model / "params/ln_vision.bias/0"
    file.write_bytes(file.read_bytes()[:-1])
    message, out = verify_error(capsys, model, "--json")
    assert "llama.norm.scale/0: missing" in message
    assert "ln_vision.bias/0: has 255 bytes instead of 256" in message
    assert json.loads(out)["corrupt"].keys() == {"llama/norm/scale", "ln_vision/bias"}


# Weights


def test_weights_equal_the_source_bit_exactly(tiny_model, tiny_files, capsys):
    out = run(capsys, tiny_model, "--against", tiny_files["config"].parent, "--weights-only")
    assert "346 tensors, bit-exactly equal to the PyTorch files" in out
    assert "different" not in out
    assert "note" not in out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_another_dtype_equal_the_rounded_source(tiny_files, tmp_path, capsys, dtype):
    convert_files(tiny_files, tmp_path / "model", dtype=dtype)
    out = run(capsys, tmp_path / "model", *options(tiny_files), "--weights-only", "--json")
    report = json.loads(out)
    assert report["equal"]
    assert [component["different"] for component in report["components"]] == [[]] * 12


def test_a_weight_that_differs_is_reported(tiny_model, tiny_files, tmp_path, capsys):
    def spoil(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-6

    paths = tiny_files | {"llama": edited(tiny_files["llama"], tmp_path, spoil)}
    message, out = verify_error(capsys, tiny_model, *options(paths), "--weights-only")
    what = "llama/blocks/mlp/up/kernel, row 1 (model.layers.1.mlp.up_proj.weight)"
    assert message == f"{tiny_model}: not equal to its PyTorch files: 1 array differs: {what}"
    assert "1 different" in out


def test_renamed_source_files_are_noted(tiny_model, tiny_files, tmp_path, capsys):
    other = shutil.copy(tiny_files["vl"], tmp_path / "renamed.safetensors")
    out = run(capsys, tiny_model, *options(tiny_files | {"vl": other}), "--weights-only")
    assert f"other names or sizes than {other}" in out


# Computed values


@pytest.fixture(scope="module")
def model_components(tiny_model, tiny_files) -> list:
    from vllama_jax.convert.verify.reference.llama import configuration
    from vllama_jax.convert.verify.stages import model_components

    config = open_model(tiny_model).config
    return model_components(config, configuration(tiny_files["llama"], config.llama), 64)


def test_every_weight_is_used_by_a_stage(tiny_model, model_components):
    patterns = [pattern for component in model_components for stage in component.stages for pattern in stage.leaves]
    paths = open_model(tiny_model).manifest["leaves"]
    assert [path for path in paths if not any(fnmatchcase(path, pattern) for pattern in patterns)] == []


WHOLE = {
    "vit": lambda n, x: n.vit(x),
    "image_qformer": lambda n, x: n.image_qformer(n.ln_vision(x)),
    "video_qformer": lambda n, x: n.video_qformer(n.add_frame_positions(x)),
    "llama_proj": lambda n, x: n.llama_proj(x),
    "imagebind/audio": lambda n, x: n.imagebind.audio(x),
    "imagebind/vision": lambda n, x: n.imagebind.vision(x),
    "audio_qformer": lambda n, x: n.audio_qformer(n.add_clip_positions(x)),
    "audio_llama_proj": lambda n, x: n.audio_llama_proj(x),
    "llama": lambda n, ids: n(n.embed(ids), jnp.ones(ids.shape, bool)),
}


@pytest.fixture(scope="module")
def network(tiny_model) -> VideoLlama:
    return load(tiny_model).network


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_the_stages_of_a_component_equal_the_component(tiny_model, network, model_components, name):
    """Run the stages one at a time, as verify does, and compare with the full network."""
    directory, component = (
        open_model(tiny_model),
        next(component for component in model_components if component.name == name),
    )
    x = component.random_input(np.random.default_rng(0))
    with jax.default_matmul_precision("highest"):
        full = jax.jit(WHOLE[name])(network, x)
        run_stage = make_jax_runner(directory, "float32")
        for stage in component.stages:
            x = run_stage(component, stage, x)
    np.testing.assert_allclose(x[0] if isinstance(x, tuple) else x, full, atol=1e-5)


@pytest.mark.slow
def test_a_good_model_passes(tiny_model, tiny_files, capsys):
    report = json.loads(run(capsys, tiny_model, *options(tiny_files), "--json"))
    layers, logits = report["layers"], report["logits"]
    assert report["equal"]
    assert max(layer["relative"] for layer in layers) < 5e-6
    assert {layer["component"] for layer in layers} == WHOLE.keys()
    llama = [layer["layer"] for layer in layers if layer["component"] == "llama"]
    assert llama == ["embeddings", "layer 0", "layer 1", "layer 2", "logits"]
    assert (logits["positions"], logits["top1"]) == (1024, 1.0)
    assert 0 <= logits["mean_kl"] <= logits["max_kl"] < 1e-10


@pytest.mark.slow
def test_a_good_model_in_bfloat16(tiny_files, tmp_path, capsys):
    """Weights that --dtype rounds are rounded in torch, too; our side computes in float32, then in bfloat16."""
    convert_files(tiny_files, tmp_path / "model", dtype="bfloat16")
    command = (tmp_path / "model", *options(tiny_files), "--tokens", 100)
    assert max(layer["relative"] for layer in json.loads(run(capsys, *command, "--json"))["layers"]) < 5e-6
    out = run(capsys, *command, "--dtype", "bfloat16")
    assert "reproduces its PyTorch files in bfloat16" in out
    assert "logits of 100 tokens: mean KL " in out


def swap(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors |= dict(zip(names, [tensors[name] for name in reversed(names)], strict=True))

    return change


SWAPS = {
    "eva_vit": swap("blocks.1.attn.q_bias", "blocks.1.attn.v_bias"),
    "blip2": swap(*(f"Qformer.bert.encoder.layer.3.attention.self.{name}.weight" for name in ("query", "key"))),
    "imagebind": swap(*(f"modality_trunks.audio.blocks.1.attn.bias_{name}" for name in "kv")),
    "vl": swap(*(f"video_Qformer.bert.encoder.layer.1.crossattention.self.{name}.weight" for name in ("key", "value"))),
    "llama": swap(*(f"model.layers.1.self_attn.{name}_proj.weight" for name in "kv")),
}


@pytest.mark.slow
def test_swapped_weights_are_located(tiny_model, tiny_files, tmp_path, capsys):
    """A model with swapped tensors, as an incorrect conversion would make it."""
    wrong = tiny_files | {kind: edited(tiny_files[kind], tmp_path, change) for kind, change in SWAPS.items()}
    convert_files(wrong, tmp_path / "model")
    message, out = verify_error(capsys, tmp_path / "model", *options(tiny_files), "--tokens", 100, "--json")
    report = json.loads(out)
    assert not report["equal"]
    first = [failure.split(":")[0] for failure in report["failures"]]
    assert first == [
        *("vit, layer 1", "image_qformer, layer 3", "video_qformer, layer 1", "imagebind/audio, layer 1"),
        *("llama, layer 1", "logits", "logits"),
    ]
    assert message.startswith(f"{tmp_path / 'model'}: does not reproduce its PyTorch files: vit, layer 1: relative ")
    assert "above 1e-04" in message
    assert max(layer["relative"] for layer in report["layers"] if layer["layer"] == "layer 0") < 5e-6


@pytest.mark.slow
def test_a_wrong_rope_theta_is_located(tiny_model, tiny_files, tmp_path, capsys):
    model = copied(tiny_model, tmp_path)
    fields = json.loads((model / "config.json").read_text())
    fields["model"]["llama"]["rope_theta"] = 10100.0
    (model / "config.json").write_text(json.dumps(fields))
    message, out = verify_error(capsys, model, *options(tiny_files))
    assert "llama.rope_theta is 10100.0 in config.json, but 10000.0 in the source; llama, layer 0: relative " in message
    assert "logits of 1024 tokens" in out
    assert "vit, " not in message


@pytest.mark.slow
def test_non_finite_weights_are_reported(tiny_model, tiny_files, tmp_path, capsys):
    def spoil(tensors: Tensors) -> None:
        tensors["blocks.0.norm1.weight"][0] = np.nan

    convert_files(tiny_files | {"eva_vit": edited(tiny_files["eva_vit"], tmp_path, spoil)}, tmp_path / "model")
    message, out = verify_error(capsys, tmp_path / "model", *options(tiny_files), "--tokens", 8, "--json")
    assert "vit, layer 0: relative error nan" in message
    assert next(layer for layer in json.loads(out)["layers"] if layer["layer"] == "layer 0")["relative"] is None


@pytest.mark.slow
def test_golden_layers_equal_torchs(golden_model, golden_files, capsys):
    """The original's own layouts: .pth files and .bin shards."""
    report = json.loads(run(capsys, golden_model, *options(golden_files), "--json"))
    assert max(layer["relative"] for layer in report["layers"]) < 5e-6
    run(capsys, golden_model, *options(golden_files), "--weights-only")


# Sources


@pytest.mark.slow
def test_a_base_without_branches_is_verified(tiny_files, tmp_path, capsys):
    """MiniGPT-4's projection is compared; components that the base never had are not required."""
    base = drop_components(tiny_files, "vl", "al", "imagebind")
    convert_files(base, tmp_path / "model")
    out = run(capsys, tmp_path / "model", "--against", tiny_files["config"].parent, "--tokens", 8, "--json")
    components = {layer["component"] for layer in json.loads(out)["layers"]}
    assert components == {"vit", "image_qformer", "llama_proj", "llama"}


def test_two_files_of_one_component_are_reported(tiny_model, tiny_files, tmp_path, capsys):
    other = shutil.copy(tiny_files["vl"], tmp_path / "other.safetensors")
    message, _ = verify_error(capsys, tiny_model, "--against", tiny_files["config"].parent, tmp_path)
    expected = (
        f"{tiny_files['vl']} and {other}: both are a Video-LLaMA vision-language checkpoint; choose one with --vl"
    )
    assert message == expected


def test_a_tensor_missing_from_the_source_is_reported(tiny_model, tiny_files, tmp_path):
    def spoil(tensors: Tensors) -> None:
        del tensors["blocks.2.norm2.bias"]

    paths = tiny_files | {"eva_vit": edited(tiny_files["eva_vit"], tmp_path, spoil)}
    with pytest.raises(SystemExit, match=r"missing in .*eva_vit_g.safetensors: blocks.2.norm2.bias \[64\]"):
        cli.main(["verify", str(tiny_model), *map(str, options(paths))])


def test_a_source_of_other_components_is_reported(tiny_model, tiny_files, tmp_path, capsys):
    message, _ = verify_error(capsys, tiny_model, *options(drop_components(tiny_files, "vl")))
    assert message.startswith(f"{tiny_model}: has frame_positions, ")
    assert "but the source does not; add the file that it was converted from" in message
    convert_files(drop_components(tiny_files, "vl", "minigpt4"), tmp_path / "model")
    message, _ = verify_error(capsys, tmp_path / "model", *options(tiny_files), "--weights-only")
    assert message.startswith(f"{tmp_path / 'model'}: has no frame_positions, ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--weights-only",), "--weights-only compares with the PyTorch files: give them with --against"),
        (("--against", "nowhere"), "nowhere: no such file or directory; give a weight file or a directory of them"),
        (("--vl", "x.pth"), "no LLaMA directory among the PyTorch files; give it with --llama"),
    ],
)
def test_invalid_options_are_refused(tiny_model, capsys, arguments, text):
    assert verify_error(capsys, tiny_model, *arguments)[0] == text


def test_without_transformers_the_error_says_what_to_install(tiny_model, tiny_files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message, _ = verify_error(capsys, tiny_model, *options(tiny_files))
    expected = "running the PyTorch side needs transformers, which is not installed: pip install 'vllama-jax[verify]'"
    assert message == f"{expected}; or add --weights-only"


@pytest.mark.slow
def test_verify_in_a_process_prints_the_first_difference_and_exits_with_1(tiny_model, tiny_files, tmp_path):
    model = copied(tiny_model, tmp_path)
    flip_a_byte(model, "vit/positions")
    done = run_vllama("verify", model)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"vllama: {model}: corrupt: vit/positions (")
    against = ("--against", tiny_files["config"].parent, "--weights-only")
    assert "1 array differs: vit/positions (pos_embed)" in expect_error_line("verify", model, *against)
