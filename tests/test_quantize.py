"""Quantized weights: rounding errors, quantization at load and in a directory, sharding, and refused uses."""

import dataclasses
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_fixtures import expect_error_line
from conversions import convert_files, drop_components
from jax.sharding import PartitionSpec
from train_fixtures import RecordingReporter, short_config
from written_runs import flat_state, random_leaves, vision_stage1_config, write_run

from vllama_jax import cli, sharding
from vllama_jax.checkpoints import quantize
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.config import GenerationConfig, LoraConfig, VideoLlamaConfig, tiny
from vllama_jax.errors import CheckpointError, ConfigError, VllamaError
from vllama_jax.generate import EmbeddedPrompt, generate
from vllama_jax.model import load
from vllama_jax.nn import quantized
from vllama_jax.nn.attention import largest_divisor
from vllama_jax.nn.video_llama import VideoLlama
from vllama_jax.train.loop import train

SLOW = pytest.mark.slow
SCHEMES = ("int8", "int4")
PRODUCTS = {"a CPU's": quantized._blocked_matmul, "others'": quantized._matmul}
Stored = dict[str, Path]


@pytest.fixture(scope="module")
def stored(tiny_model, tmp_path_factory) -> Stored:
    """The tiny model, quantized with each scheme."""
    out = tmp_path_factory.mktemp("quantized")
    for scheme in SCHEMES:
        quantize.quantize(open_model(tiny_model), out / scheme, scheme)
    return {scheme: out / scheme for scheme in SCHEMES}


def weights(network: VideoLlama) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat_state(network)}


# One kernel


def kernel_of(shape: tuple[int, ...], inputs: int) -> np.ndarray:
    """Return random weights of a wide range, with one output of zeros and one with a single large weight."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal(shape, np.float32) * np.exp(rng.standard_normal(shape[inputs:])).astype(np.float32)
    kernel[..., 0] = 0
    kernel[(0,) * inputs][..., 1] = 100
    return kernel


KERNELS = [((256, 96), 1), ((384, 3, 2, 16), 1), ((4, 64, 32), 2), ((279, 33), 1)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("shape", "inputs"), KERNELS)
def test_rounding_errors_are_at_most_half_a_step(shape, inputs, bits):
    kernel = kernel_of(shape, inputs)
    values, scale = quantized.quantize_kernel(kernel, inputs, bits)
    rows = int(np.prod(shape[:inputs]))
    groups = {8: 1, 4: rows // largest_divisor(rows, 128)}[bits]
    assert scale.shape == (groups, *shape[inputs:])
    steps = np.repeat(scale, rows // groups, axis=0).reshape(shape)
    error = np.abs(quantized.dequantize_kernel(values, scale, inputs) - kernel)
    assert np.all(error <= steps * 0.5001)
    assert np.all(error[..., 0] == 0)
    assert np.allclose(scale, np.abs(kernel).reshape(groups, -1, *shape[inputs:]).max(axis=1) / (2 ** (bits - 1) - 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("width", [6, 7, 1])
def test_int4_packs_two_weights_in_a_byte(width):
    values = np.random.default_rng(0).integers(-7, 8, (5, 3, width)).astype(np.int8)
    packed = quantized.pack_int4(values)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (5, 3, -(-width // 2))
    np.testing.assert_array_equal(quantized.unpack_int4(packed, width, jnp.float32), values)
    assert quantized.pack_int4(np.array([-7, 1], np.int8)).tolist() == [1 | 9 << 4]


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("shape", "inputs"), KERNELS)
@pytest.mark.parametrize("positions", [1, 40])
def test_products_equal_those_of_the_dequantized_kernel(shape, inputs, bits, product, positions):
    values, scale = quantized.quantize_kernel(kernel_of(shape, inputs), inputs, bits)
    x = np.random.default_rng(1).standard_normal((2, positions, *shape[:inputs]), np.float32)
    expected = np.tensordot(x, quantized.dequantize_kernel(values, scale, inputs), inputs)
    run = jax.jit(partial(PRODUCTS[product], inputs))
    assert np.abs(run(x, values, scale) - expected).max() < 2e-6 * np.abs(expected).max()
    rounded = run(x.astype(jnp.bfloat16), values, scale)
    assert rounded.dtype == jnp.float32
    assert np.abs(rounded - expected).max() < 2e-2 * np.abs(expected).max()


@pytest.mark.slow
def test_a_stored_model_records_its_source(tiny_model, stored):
    sources = open_model(tiny_model).manifest["sources"]
    assert sources
    for path in stored.values():
        assert open_model(path).manifest["sources"] == sources


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_multiply_the_full_kernel_at_once(platform):
    """The compiled program has one product with a converted input, and neither a loop nor interleaved copies."""
    layer = quantize.abstract_layers(tiny(), "bfloat16", "int4")[1]["llama/head"]
    x = jax.ShapeDtypeStruct((1, 64), jnp.bfloat16)
    traced = jax.jit(lambda layer, x: layer.matmul(x)).trace(layer, x)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" not in text
    assert text.count("stablehlo.dot_general") == 1


# A model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=SLOW)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_while_loading_equals_stored_quantized(tiny_model, stored, scheme, dtype):
    at_load = weights(load(tiny_model, dtype, quantize=scheme).network)
    from_disk = weights(load(stored[scheme], dtype).network)
    assert at_load.keys() == from_disk.keys()
    for path, value in at_load.items():
        assert value.dtype == from_disk[path].dtype, path
        np.testing.assert_array_equal(value, from_disk[path], path)
    assert at_load["llama/blocks/0/mlp/up/scale"].dtype == np.float32
    assert at_load["llama/blocks/0/mlp/up/values"].dtype == {"int8": np.int8, "int4": np.uint8}[scheme]
    assert at_load["llama/head/values"].dtype == np.int8
    assert at_load["llama/embedding"].dtype.name == at_load["vit/blocks/mlp/up/bias"].dtype.name == dtype


@pytest.mark.slow
def test_only_listed_kernels_are_quantized(tiny_model, stored):
    """The kernels of the table and nothing else, with the bytes of 8 and 4 bits."""
    before = open_model(tiny_model).manifest["leaves"]
    kernels = quantized_kernels(tiny_model)
    for scheme, model in stored.items():
        directory = open_model(model)
        after = directory.manifest["leaves"]
        result = {f"{path}/{name}" for path in kernels for name in ("values", "scale")}
        assert after.keys() == (before.keys() - {f"{path}/kernel" for path in kernels}) | result
        assert {path: after[path] for path in after.keys() - result} == {
            path: before[path] for path in after.keys() - result
        }
        assert (directory.quantized, directory.config) == (scheme, open_model(tiny_model).config)
    shapes = open_model(stored["int4"]).shapes
    assert shapes["llama/blocks/mlp/up/values"] == (3, 64, 56)
    assert shapes["llama/blocks/mlp/up/scale"] == (3, 1, 112)
    assert shapes["vit/blocks/mlp/up/values"] == (3, 64, 140)  # of 279


@jax.jit
def logits(network, ids):
    return network(network.embed(ids), jnp.ones(ids.shape, bool))


@SLOW
def test_quantized_logits_of_a_long_prompt_are_close(tiny_model, stored):
    ids = np.random.default_rng(0).integers(512, size=(1, 256))
    full = np.asarray(logits(load(tiny_model).network, ids))
    agreement = {"int8": 0.93, "int4": 0.4}  # random weights give close logits
    for scheme, model in stored.items():
        found = np.asarray(logits(load(model).network, ids))
        assert found.dtype == np.float32
        assert np.abs(found - full).max() < {"int8": 0.05, "int4": 0.7}[scheme] * np.abs(full).max()
        assert np.mean(found.argmax(-1) == full.argmax(-1)) > agreement[scheme]


def answer(network: VideoLlama) -> list[int]:
    prompt = EmbeddedPrompt(np.arange(3, 40, dtype=np.int32), np.zeros(37, bool), jnp.zeros((0, 64)))
    config = GenerationConfig(max_new_tokens=12)
    return [token for rows in generate(network.llama, [prompt], config, bos=1, eos=600) for token in rows[0]]


@SLOW
def test_quantized_answers_and_video_tokens_are_close(tiny_model, stored):
    full, eight = load(tiny_model).network, load(stored["int8"]).network
    assert answer(eight)[:3] == answer(full)[:3]
    frames = np.random.default_rng(0).standard_normal((1, 2, 224, 224, 3), np.float32)
    encode = jax.jit(lambda network, frames: network.encode_video(frames))
    expected = np.asarray(encode(full, frames))
    assert 0 < np.abs(encode(eight, frames) - expected).max() < 0.05 * np.abs(expected).max()


@SLOW
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weights_are_sharded_over_a_mesh(tiny_model, stored, scheme):
    """Quantized at load and stored, sharded over a tensor axis that divides only some of the dimensions."""
    mesh = sharding.make_mesh(data=4, tensor=2)
    alone = load(stored[scheme]).network
    for path, asked in ((tiny_model, scheme), (stored[scheme], None)):
        split = load(path, mesh=mesh, quantize=asked).network
        gate = split.llama.blocks[0].mlp.gate
        assert gate.values[...].sharding.spec == PartitionSpec(None, ("tensor",))
        assert gate.scale[...].sharding.spec == PartitionSpec(None, ("tensor",))
        assert split.llama.head.values[...].sharding.spec == PartitionSpec(None, ("tensor",))
        for name, value in weights(alone).items():
            np.testing.assert_array_equal(value, weights(split)[name], name)
        ids = np.random.default_rng(0).integers(512, size=(1, 100))
        with sharding.use_mesh(mesh):
            found = np.asarray(logits(split, ids))
        expected = np.asarray(logits(alone, ids))
        assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
        assert answer(split) == answer(alone)


def quantized_kernels(model: Path) -> set[str]:
    """Return the paths of the quantized layers."""
    layers = quantized.list_quantized_layers(open_model(model).config)
    return {f"{parent}/{name}" for parent, names in layers.items() for name in names}


def assert_leaves_are_those_of_the_base(run: Path, base: Path, quantized_run: Path) -> None:
    """Check that every quantized kernel has two arrays, and that LoRA updates have none."""
    kernels = quantized_kernels(base)
    expected = set()
    for path in open_model(base).shapes:
        layer = path.removesuffix("/kernel")
        expected |= {f"{layer}/values", f"{layer}/scale"} if layer in kernels else {path}
    assert set(open_model(quantized_run).shapes) == expected
    assert any("/lora/" in path for path in open_model(run).shapes)


def test_a_quantized_run_has_the_leaves_of_its_base(tiny_model, tmp_path):
    lora = LoraConfig(rank=2, targets=("query", "out", "down"))
    run = write_run(
        vision_stage1_config(tiny_model, lora),
        tmp_path / "run",
        random_leaves(tiny(vocab_size=512), lora, "frame_positions"),
    )
    quantize.quantize(open_model(run), tmp_path / "int8", "int8")
    assert_leaves_are_those_of_the_base(run, tiny_model, tmp_path / "int8")


@SLOW
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_with_lora_updates_is_quantized(tiny_model, tmp_path, scheme):
    """Updates are merged before quantization, both at load and in a directory."""
    lora = LoraConfig(rank=3, alpha=6.0, targets=("query", "out", "down"))
    trained = random_leaves(tiny(vocab_size=512), lora, "frame_positions")
    run = write_run(vision_stage1_config(tiny_model, lora), tmp_path / "run", trained)
    merged = load(run).network.llama.blocks[1].attention.query.kernel[...]
    quantize.quantize(open_model(run), tmp_path / scheme, scheme)
    assert_leaves_are_those_of_the_base(run, tiny_model, tmp_path / scheme)
    assert not any("/lora/" in path for path in open_model(tmp_path / scheme).shapes)
    at_load, from_disk = load(run, quantize=scheme).network, load(tmp_path / scheme).network
    for path, value in weights(at_load).items():
        np.testing.assert_array_equal(value, weights(from_disk)[path], path)
    layer = at_load.llama.blocks[1].attention.query
    kernel = quantized.dequantize_kernel(layer.values[...], layer.scale[...], 1)
    step = float(layer.scale[...].max())
    np.testing.assert_allclose(kernel, merged, atol=0.51 * step)


def test_a_tied_head_is_not_quantized(tiny_model):
    cfg = open_model(tiny_model).config
    tied = dataclasses.replace(cfg, llama=dataclasses.replace(cfg.llama, tie_embeddings=True))
    _, layers = quantize.abstract_layers(tied, "float32", "int8")
    assert "llama/head" not in layers
    assert "llama/blocks/mlp/up" in layers


def test_published_widths_have_groups_of_128():
    from vllama_jax.config import video_llama_7b, video_llama_13b

    for config in (video_llama_7b(), video_llama_13b()):
        assert {group(layer) for layer in abstract(config).values() if layer.bits == 4} == {128}


def abstract(config: VideoLlamaConfig) -> quantize.QuantizedLayers:
    return quantize.abstract_layers(config, "bfloat16", "int4")[1]


def group(layer: quantized.QuantizedLinear) -> int:
    stacked = layer.kernel_shape[0]
    rows = int(np.prod(layer.kernel_shape)) // int(np.prod(layer.scale.shape[2:])) // stacked
    return rows // layer.scale.shape[1]


# Errors of quantization


def cost(capsys, *arguments: object) -> dict:
    cli.main(["verify", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


@SLOW
@pytest.mark.parametrize("scheme", SCHEMES)
def test_verify_reports_the_cost_of_quantization(tiny_model, tiny_files, stored, capsys, scheme):
    against = ("--against", tiny_files["config"].parent, "--tokens", 256)
    at_load = cost(capsys, tiny_model, *against, "--quantize", scheme)
    report = cost(capsys, stored[scheme], *against)
    assert at_load.pop("digest") == open_model(tiny_model).digest != report.pop("digest")
    assert report == at_load
    assert (report["quantized"], report["equal"], report["failures"]) == (scheme, False, [])
    layers = report["layers"]
    errors = {name: max(layer["relative"] for layer in layers if layer["component"] == name) for name in PARTS}
    assert all(error < 5e-6 for name, error in errors.items() if name not in ("vit", "llama"))
    assert all(errors[name] > 5e-3 for name in ("vit", "llama"))
    assert 1e-6 < report["logits"]["mean_kl"] < {"int8": 1e-3, "int4": 0.1}[scheme]
    assert bool(report["beyond_bounds"]) == (scheme == "int4")  # random weights have large rounding errors


PARTS = ("vit", "image_qformer", "video_qformer", "imagebind/audio", "imagebind/vision", "audio_qformer", "llama")


def test_verify_checks_hashes_of_quantized_weights(stored, tmp_path, capsys):
    cli.main(["verify", str(stored["int4"])])
    assert ", intact" in capsys.readouterr().out
    model = Path(shutil.copytree(stored["int4"], tmp_path / "model"))
    file = next((model / "params" / "llama.blocks.mlp.up.values").glob("0*"))
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    assert "corrupt: llama/blocks/mlp/up/values" in expect_error_line("verify", model)


def test_inspect_reports_quantized_weights(tiny_model, stored, capsys):
    cli.main(["inspect", str(stored["int4"])])
    assert "quantized to int4" in capsys.readouterr().out
    found = {}
    for model in (tiny_model, stored["int8"]):
        cli.main(["inspect", str(model), "--json"])
        found[model] = json.loads(capsys.readouterr().out)
    assert (found[tiny_model]["quantized"], found[stored["int8"]]["quantized"]) == (None, "int8")
    quantized, full = (found[model]["components"]["llama"]["bytes"] for model in (stored["int8"], tiny_model))
    assert quantized < 0.5 * full


# Refused uses


def test_invalid_uses_of_quantized_models_are_refused(tiny_model, stored, tmp_path):
    taken = "use the original model"
    with pytest.raises(ConfigError, match="quantized to int8 or int4, not 'int3'"):
        load(tiny_model, quantize="int3")
    with pytest.raises(ConfigError, match=f"its weights are already int8; {taken}"):
        load(stored["int8"], quantize="int4")
    assert load(stored["int8"], quantize="int8").network.llama.head.bits == 8
    assert expect_error_line("quantize", stored["int8"], "--out", tmp_path / "out").endswith(
        "its weights are already int8; use the original model"
    )
    assert expect_error_line("quantize", tiny_model, "--out", stored["int4"]).endswith(
        "int4: already exists; remove it or choose another path"
    )
    needs = "--quantize compares with the PyTorch files: give them with --against"
    assert expect_error_line("verify", tiny_model, "--quantize", "int8") == needs
    message = expect_error_line("verify", stored["int8"], "--against", tmp_path, "--weights-only")
    assert message.endswith("int8 weights differ from the PyTorch files; leave out --weights-only")
    assert list(tmp_path.iterdir()) == []


def test_quantized_weights_cannot_be_trained(stored, records, tmp_path):
    out, refusal = tmp_path / "out", "int8 weights support only inference; use the original model"
    assert refusal in expect_error_line("export", stored["int8"], "--out", out, "--format", "safetensors")
    with pytest.raises(CheckpointError, match=refusal):
        train(short_config(stored["int8"], records), out, RecordingReporter())
    assert not out.exists()


def test_a_quantized_base_without_branches_is_refused(tiny_files, tmp_path):
    """Missing components are listed as for any model."""
    convert_files(drop_components(tiny_files, "vl", "al", "minigpt4"), tmp_path / "base")
    quantize.quantize(open_model(tmp_path / "base"), tmp_path / "m8", "int8")
    with pytest.raises(CheckpointError, match="the model has no frame_positions, llama_proj, video_qformer"):
        load(tmp_path / "m8")


def test_an_incomplete_kernel_is_refused(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    next((model / "params" / "llama.head.kernel").glob("0*")).unlink()
    with pytest.raises(CheckpointError, match=r"llama\.head\.kernel.*: missing"):
        load(model, quantize="int8")
    with pytest.raises(VllamaError, match=r"llama\.head\.kernel.*: missing"):
        quantize.quantize(open_model(model), tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


# Commands


@SLOW
def test_commands_run_in_their_own_process(tiny_model, clip, tmp_path):
    vllama = Path(sys.executable).with_name("vllama")
    done = subprocess.run(
        [vllama, "quantize", tiny_model, "--out", tmp_path / "m4", "--quantize", "int4"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'm4'}: ")
    asked = ["What?", "--max-new-tokens", "3", "--json"]
    answers = [
        subprocess.run([vllama, "chat", clip, *asked, "--model", *model], capture_output=True, text=True, check=True)
        for model in ([tmp_path / "m4"], [tiny_model, "--quantize", "int4"])
    ]
    stored, at_load = (json.loads(done.stdout)["tokens"] for done in answers)
    assert stored == at_load
