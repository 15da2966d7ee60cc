"""`vllama memory`: static memory is exact, and temporary memory is compared with XLA's figures."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from networks import random_network

from vllama_jax import cli, sharding
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli._model_config import SIZES
from vllama_jax.config import EVA_G, LLAMA_7B, GenerationConfig, VideoLlamaConfig, tiny, video_llama
from vllama_jax.data.config import DataConfig, DatasetConfig
from vllama_jax.errors import ConfigError
from vllama_jax.generate import programs
from vllama_jax.generate.choose import make_settings
from vllama_jax.generate.engine import shape_for
from vllama_jax.memory import estimate
from vllama_jax.memory.abstract_run import abstract_run, compiled_memory
from vllama_jax.memory.activations import StepShape, estimate_prefill_layer
from vllama_jax.memory.estimate import DEVICES, Device, MemoryEstimate
from vllama_jax.model import load
from vllama_jax.nn import attention
from vllama_jax.nn.network import abstract_network
from vllama_jax.train.config import AUDIO_BRANCH, LORA, VISION_BRANCH, LoraConfig, MeshConfig, TrainConfig
from vllama_jax.train.config_files import load_config

SLOW = pytest.mark.slow
GIGA = 10**9
CPU = Device("cpu", 16 * GIGA, 1.0, 8, is_host=True)
ALONE = MeshConfig(data=1)
TEMPORARY = ("gradients", "saved activations", "gathered weights", "activations")
LOW, HIGH = 0.75, 2.0  # estimates of temporaries are within these multiples of XLA's figure


def config_of(mesh: MeshConfig = ALONE, rows: int = 4, **options) -> TrainConfig:
    """Return a run config with `rows` examples on each shard of the mesh."""
    size = rows * mesh.data * mesh.fsdp
    fields = {"model": "m", "datasets": (DatasetConfig(path="d"),), "steps": 10, "batch_size": size, "mesh": mesh}
    return TrainConfig(**{**fields, **options})


def split_need(need: MemoryEstimate) -> tuple[int, int]:
    """Return the static and the temporary bytes on a device."""
    temporary = sum(need.device[entry] for entry in TEMPORARY)
    return need.device_total - temporary, temporary


def medium() -> VideoLlamaConfig:
    """Return a config large enough for activations to exceed those of the frames."""
    llama = dataclasses.replace(
        LLAMA_7B, width=512, depth=8, num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=1408, vocab_size=8000
    )
    vit = dataclasses.replace(EVA_G, width=352, depth=4, num_heads=4, mlp_dim=1536)
    return dataclasses.replace(video_llama(llama), vit=vit)


# Steps compiled here for CPU devices, and the estimate of their temporaries as a multiple of jaxlib 0.10's figure.
# For the tiny model on one device, most of the estimate is attention scores; XLA's CPU code stores only some of them.
COMPILED = [
    pytest.param(tiny(), ALONE, 128, {}, 4.38, id="tiny"),
    pytest.param(tiny(), MeshConfig(data=2, fsdp=2, tensor=2), 256, {}, 1.38, id="tiny on 8"),
    pytest.param(tiny(), ALONE, 128, {"branch": "audio", "trainable": AUDIO_BRANCH}, 4.76, id="tiny, audio"),
    pytest.param(
        tiny(),
        ALONE,
        128,
        {"lora": LoraConfig(rank=4), "trainable": (*VISION_BRANCH, *LORA)},
        4.38,
        id="low rank",
    ),
    pytest.param(medium(), ALONE, 128, {"data": DataConfig(feature_cache="f")}, 1.26, id="medium, features"),
    pytest.param(medium(), MeshConfig(data=1, fsdp=8), 128, {}, 0.96, id="medium on 8"),
    pytest.param(medium(), ALONE, 512, {"grad_accum_steps": 2}, 1.11, id="medium in parts"),
    pytest.param(medium(), ALONE, 256, {"remat_policy": "dots"}, 1.18, id="medium, dots"),
    pytest.param(medium(), ALONE, 256, {"remat_policy": "none"}, 1.19, id="medium, none"),
]


@SLOW
@pytest.mark.parametrize(("model", "mesh", "length", "options", "ratio"), COMPILED)
def test_step_estimate_matches_compiled_memory(model, mesh, length, options, ratio):
    config = config_of(mesh, compute_dtype="float32", **options)
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    device_mesh = sharding.make_mesh(mesh.data, mesh.fsdp, mesh.tensor, devices=devices)
    compiled = compiled_memory(abstract_run(model, config, device_mesh, length), device_mesh)
    static, temporary = split_need(estimate.estimate_training(model, "step", config, mesh, CPU, length))
    assert static == pytest.approx(compiled.argument_size_in_bytes, rel=1e-3)
    assert temporary / compiled.temp_size_in_bytes == pytest.approx(ratio, rel=0.1)


# Steps compiled for TPUs by libtpu 0.0.52: size, mesh, examples per shard, tokens, encoders, GB of arguments and of
# temporaries, and the estimate of temporaries as a multiple of the latter. The first seven are the package's step; the
# others are a prototype in plain JAX with the same shapes.
TPUS = [
    ("7b", (1, 16, 1), 4, 128, True, 1.033, 0.644, 1.68),
    ("7b", (1, 16, 1), 4, 512, True, 1.033, 1.275, 1.58),
    ("7b", (1, 16, 1), 16, 128, True, 1.050, 2.907, 0.85),
    ("7b", (4, 1, 4), 4, 128, True, 4.019, 0.163, 2.10),
    ("13b", (1, 16, 1), 4, 128, True, 1.819, 0.841, 1.96),
    ("13b", (1, 16, 1), 4, 512, True, 1.819, 1.897, 1.55),
    ("7b", (4, 1, 1), 32, 128, True, 15.969, 2.971, 1.65),
    ("7b", (2, 128, 1), 4, 128, True, 0.14, 0.74, 1.45),
    ("7b", (2, 128, 1), 32, 128, True, 0.18, 4.63, 1.04),
    ("13b", (2, 128, 1), 8, 128, True, 0.24, 1.46, 1.37),
    ("13b", (1, 16, 1), 4, 128, True, 1.82, 1.33, 1.24),
    ("13b", (1, 64, 1), 8, 128, True, 0.47, 2.04, 0.98),
    ("13b", (2, 128, 1), 8, 128, True, 0.24, 1.48, 1.36),
    ("7b", (1, 256, 1), 4, 128, False, 0.06, 0.71, 1.51),
    ("7b", (1, 64, 4), 16, 128, False, 0.07, 0.73, 1.32),
    ("7b", (1, 16, 1), 4, 128, False, 0.87, 1.11, 0.97),
    ("7b", (1, 16, 1), 4, 544, False, 0.87, 2.04, 1.03),
    ("13b", (2, 128, 1), 4, 544, True, 0.24, 2.43, 1.26),
]


@pytest.mark.parametrize("row", TPUS, ids=str)
def test_step_estimate_matches_tpu_compilations(row):
    size, (data, fsdp, tensor), rows, length, encoders, arguments, temporaries, ratio = row
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    config = config_of(mesh, rows, data=DataConfig() if encoders else DataConfig(feature_cache="f"))
    need = estimate.estimate_training(SIZES[size](), "step", config, mesh, DEVICES["v5e"], length)
    static, temporary = split_need(need)
    assert static == pytest.approx(arguments * GIGA, rel=0.1, abs=0.01 * GIGA)
    assert temporary / (temporaries * GIGA) == pytest.approx(ratio, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [pytest.param(None, marks=SLOW), pytest.param("int8", marks=SLOW), "int4"])
def test_chat_estimate_matches_loaded_and_compiled_memory(tiny_model, scheme):
    mesh = sharding.make_mesh(data=2, tensor=4)
    network = load(tiny_model, mesh=mesh, quantize=scheme).network
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(network))
    config = open_model(tiny_model).config
    need = estimate.estimate_chat(config, MeshConfig(data=2, tensor=4), CPU, scheme=scheme)
    assert sum(need.device.values()) - need.device["KV cache"] - need.device["activations"] == held
    assert isinstance(jax.tree.leaves(network)[0].sharding, NamedSharding)


@SLOW
@pytest.mark.parametrize("beams", [1, 3])
def test_cache_and_prefill_estimates_match_compiled_memory(beams, monkeypatch):
    monkeypatch.setattr(attention, "_SCORE_BYTES_PER_CORE", 2**40)  # all scores at once, as on accelerators
    llama = dataclasses.replace(tiny().llama, width=256, num_heads=8, num_kv_heads=8, head_dim=32, mlp_dim=704)
    model = dataclasses.replace(tiny(), llama=llama)
    network = random_network(model).llama
    network.unstack("cpu")
    generation = GenerationConfig(num_beams=beams)
    need = estimate.estimate_chat(model, ALONE, CPU, generation=generation)
    shape = shape_for(llama.max_length - 300, 300)
    rows = generation.num_beams
    settings = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), make_settings(generation, [2], ()))
    state = jax.eval_shape(
        functools.partial(programs.empty_state, cfg=llama, shape=shape, cache_dtype="float32"), settings, np.int32(1)
    )
    chunk = programs.Chunk(
        ids=jnp.zeros((1, 512), jnp.int32),
        is_media=jnp.zeros((1, 512), bool),
        media=jnp.zeros((1, 512, 256)),
        length=np.int32(512),
        row=np.int32(0),
        start=np.int32(0),
    )
    compiled = programs.jit_prefill("cpu").lower(network, state, chunk).compile().memory_analysis()
    cache = need.device["KV cache"]
    assert cache == pytest.approx(compiled.output_size_in_bytes, rel=0.02)
    temporary = estimate_prefill_layer(llama, StepShape(rows=1, length=512, itemsize=4, mesh=ALONE), shape.capacity)
    assert LOW < temporary / compiled.temp_size_in_bytes < HIGH


def test_longest_examples_equal_the_padded_lengths():
    stages = {"vision_stage1": 72, "vision_stage2": 512, "audio_stage1": 48, "audio_stage2": 640}
    for stage, length in stages.items():
        assert estimate.longest_example_length(SIZES["7b"](), load_config(stage)[0]) == length


def test_fsdp_shards_training_memory_and_chat_refuses_fsdp():
    model, config = SIZES["7b"](), config_of(rows=8)
    split = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=8))
    full = estimate.estimate_training(model, "step", config, ALONE, DEVICES["H100"]).device
    sharded = estimate.estimate_training(model, "step", split, split.mesh, DEVICES["H100"]).device
    assert sharded["llama"] == pytest.approx(full["llama"] / 8, rel=1e-3)
    assert sharded["optimizer state"] < full["optimizer state"] / 4
    chat = estimate.estimate_chat(model, split.mesh, DEVICES["H100"]).device
    assert chat["llama"] == full["llama"]
    assert (
        estimate.estimate_chat(model, MeshConfig(data=1, tensor=8), DEVICES["H100"]).device["llama"] < full["llama"] / 7
    )


def test_beams_and_longer_conversations_need_more_memory():
    model = SIZES["7b"]()
    short = estimate.estimate_chat(model, ALONE, DEVICES["H100"], length=100)
    beams = estimate.estimate_chat(model, ALONE, DEVICES["H100"], length=100, generation=GenerationConfig(num_beams=4))
    assert short.device["KV cache"] == 448 * 32 * 2 * 4096 * 2  # 128, and 320 new tokens, as generate pads
    assert beams.device["KV cache"] == 4 * short.device["KV cache"]
    with pytest.raises(ConfigError, match="the model's context has 2048 tokens"):
        estimate.estimate_chat(model, ALONE, DEVICES["H100"], length=2000)


def test_verdicts_follow_the_usable_memory():
    device = Device("d", 100, 0.5, 1)
    fits, tight, large = (MemoryEstimate("n", "", {"part": size}, {}) for size in (45, 46, 51))
    assert [estimate.verdict(need, device) for need in (fits, tight, large)] == ["fits", "tight", "does not fit"]
    shared = Device("cpu", 100, 1.0, 2, is_host=True)
    assert estimate.usable_bytes(MemoryEstimate("n", "", {}, {"program": 20}), shared) == 90


@pytest.mark.parametrize(("processes", "threads"), [(0, 8), (4, 8), (16, 16)])
def test_processes_share_the_threads_that_decode(processes, threads):
    config = config_of(data=DataConfig(num_threads=8, num_workers=processes))
    host = estimate.estimate_training(tiny(), "step", config, ALONE, CPU).host
    assert host["media decoding"] == threads * estimate.DECODER_BYTES


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_gradient_accumulation_adds_float32_sums(dtype, itemsize, grad_accum_steps):
    """Gradients are in the compute dtype and in float32; gradient accumulation adds a float32 sum."""
    shapes = abstract_network(tiny(), "float32")
    trainable = (shapes.video_qformer, shapes.llama_proj, shapes.frame_positions)
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    config = config_of(grad_accum_steps=grad_accum_steps, compute_dtype=dtype)
    need = estimate.estimate_training(tiny(), "step", config, ALONE, CPU).device
    assert need["trainable parameters"] == 4 * count
    assert need["optimizer state"] == pytest.approx(8 * count, abs=16), "and counters"
    assert need["gradients"] == (4 * grad_accum_steps + itemsize) * count


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_dominate_with_a_large_vocabulary(fsdp, tensor, tied):
    """Logits and their gradients in float32 for each label, and the gathered weights of the head."""
    llama = dataclasses.replace(tiny().llama, vocab_size=400_000, tie_embeddings=tied)
    model, mesh = dataclasses.replace(tiny(), llama=llama), MeshConfig(data=1, fsdp=fsdp, tensor=tensor)
    config = config_of(mesh, rows=3, data=DataConfig(feature_cache="f"), compute_dtype="bfloat16")
    need = estimate.estimate_training(model, "step", config, mesh, DEVICES["H100"], length=100).device
    labels = 100 - model.video_qformer.num_queries
    assert need["activations"] == 2 * 3 * labels * 400_000 // tensor * 4
    assert need["gathered weights"] == (llama.width * 400_000 * 2 if fsdp > 1 else 0)


@pytest.mark.parametrize(("processes", "prefetch", "batches"), [(0, 4, 5), (1, 4, 5), (2, 4, 9), (3, 2, 7)])
def test_prefetched_batches_are_counted_for_each_process(processes, prefetch, batches):
    """Each process decodes its own `prefetch` batches, in addition to the batch of the current step."""
    model, length, labels = tiny(), 128, 128 - tiny().video_qformer.num_queries
    mesh = MeshConfig(data=16)  # on two hosts of eight devices
    config = config_of(mesh, rows=4, data=DataConfig(num_workers=processes, prefetch=prefetch))
    images = model.num_frames * model.vit.image_size**2 * 3  # uint8
    row = images + (4 + 1) * length + 4 + (4 + 4) * labels  # ids, is_media; length; positions, targets
    host = estimate.estimate_training(model, "step", config, mesh, CPU, length).host
    assert host["prefetched batches"] == batches * 16 * 4 * row // 2
    assert host["program"] == estimate.PROGRAM_BYTES * (1 + processes)


def test_suggested_flags_fit():
    model, device, config = SIZES["13b"](), DEVICES["v5e"], load_config("vision_stage2")[0]
    need = estimate.estimate_training(model, "step", config, ALONE, device)
    assert estimate.verdict(need, device) == "does not fit"
    assert estimate.suggest_flags(model, need, config, ALONE, device) == "--mesh.data 1 --mesh.fsdp 4"
    wider = MeshConfig(data=1, fsdp=4)
    assert estimate.verdict(estimate.estimate_training(model, "step", config, wider, device), device) == "fits"
    narrow = Device("mine", 16 * GIGA, 1.0, 1)  # no more devices are available here
    assert estimate.suggest_flags(model, need, config, ALONE, narrow) == ""


@pytest.mark.parametrize("spelled", ["A100-40", "a100 40gb", "A100_40GB"])
def test_device_names_are_matched_in_any_spelling(spelled):
    assert estimate.find_device(spelled).bytes == 40 * GIGA


def test_device_here_is_this_machine():
    here = estimate.find_device("here")
    assert here.is_host
    assert GIGA // 16 < here.bytes * here.per_host < 2**44


def estimate_memory(capsys, *arguments: object) -> str:
    cli.main(["memory", *map(str, arguments)])
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_model_size_is_estimated_for_a_chat_and_both_stages(capsys):
    output = estimate_memory(capsys, "7b", "--devices", "H100")
    assert output.startswith("7b on 1 × H100 (data 1, fsdp 1, tensor 1): 80.0 GB each, 60.0 GB usable by JAX")
    assert "GB on each device      chat  vision_stage1  vision_stage2" in output
    assert "llama                 13.48          13.48          13.48" in output
    report = json.loads(
        estimate_memory(capsys, "7b", "--devices", "L4", "--branch", "audio", "--mesh.tensor", 5, "--json")
    )
    assert list(report["workloads"]) == ["chat", "audio_stage1", "audio_stage2"]
    assert report["mesh"] == {"data": 1, "fsdp": 1, "tensor": 5}
    assert "llama: heads (32) is not divisible by 5 devices and is replicated" in report["notes"]
    for use in report["workloads"].values():
        assert sum(size for entry, size in use["device"].items() if entry != "all") == use["device"]["all"]


def test_a_model_directory_is_estimated_for_all_uses(capsys, tiny_model):
    report = json.loads(estimate_memory(capsys, tiny_model, "--devices", "v5e", "--batch-size", 4, "--json"))
    assert {use["verdict"] for use in report["workloads"].values()} == {"fits"}


def test_a_quantized_model_is_estimated_for_a_chat_only(capsys, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    manifest = json.loads((model / "manifest.json").read_text())
    (model / "manifest.json").write_text(json.dumps(manifest | {"quantized": "int8"}))  # no other file is read
    full, small = (
        json.loads(estimate_memory(capsys, named, "--devices", "v5e", "--batch-size", 4, "--json"))["workloads"]
        for named in (tiny_model, model)
    )
    assert list(small) == ["chat"]
    assert small["chat"]["description"].endswith("bfloat16, int8 weights")
    assert small["chat"]["device"]["llama"] < 0.8 * full["chat"]["device"]["llama"]
    with pytest.raises(SystemExit, match="model: int8 weights support only inference; use the"):
        estimate_memory(capsys, "vision_stage1", "--model", model, "--devices", "v5e")


@SLOW
def test_a_run_directory_is_estimated_for_all_uses(capsys, stage1):
    report = json.loads(estimate_memory(capsys, stage1, "--devices", "v5e", "--batch-size", 4, "--json"))
    assert {use["verdict"] for use in report["workloads"].values()} == {"fits"}


def test_run_config_fields_can_be_overridden_by_flags(capsys):
    flags = ["--model", "13b", "--devices", "v5e", "--mesh.fsdp", 16, "--batch-size", 64, "--length", 128]
    report = json.loads(estimate_memory(capsys, "vision_stage1", *flags, "--json"))
    (use,) = report["workloads"].values()
    assert use["description"] == "batch 64, micro-batch 4 × 128 tokens, bfloat16"
    assert use["device"]["llama"] == pytest.approx(26.03e9 / 16, rel=1e-3)


@SLOW
def test_exact_estimates_come_from_the_compiled_step(capsys, tiny_model):
    flags = ["--model", tiny_model, "--batch-size", 8, "--length", 128, "--exact", "--json"]
    (use,) = json.loads(estimate_memory(capsys, "vision_stage1", *flags))["workloads"].values()
    static, temporary = split_need(
        MemoryEstimate("", "", {entry: use["device"][entry] for entry in use["device"] if entry != "all"}, {})
    )
    assert static == pytest.approx(use["compiled"]["arguments"], rel=1e-3)
    assert LOW < temporary / use["compiled"]["temporaries"] < HIGH


@pytest.mark.slow
def test_only_require_fit_makes_a_bad_fit_an_error(capsys):
    output = estimate_memory(capsys, "7b", "--devices", "v5e")
    in_python = "vl.load(MODEL, mesh=vl.sharding.make_mesh(tensor=2)) in Python"
    assert f"does not fit\n  fits with 2 devices: {in_python}\n" in output
    with pytest.raises(SystemExit, match=r"vllama: chat: does not fit; vision_stage1: .* does not fit"):
        estimate_memory(capsys, "7b", "--devices", "v5e", "--require-fit")


@pytest.mark.slow
def test_require_fit_refuses_a_tight_fit(capsys, monkeypatch):
    monkeypatch.setattr(estimate, "MARGIN", 0.9999)
    assert "tight" in estimate_memory(capsys, "tiny", "--devices", "v5e")
    with pytest.raises(SystemExit, match="vllama: chat: tight"):
        estimate_memory(capsys, "tiny", "--devices", "v5e", "--require-fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("8b",), "8b: no such model or run config; .* one of 7b, 13b, tiny, audio_stage1"),
        (("7b", "--devices", "H101"), "unknown device 'H101'; choose one of H200, H100, .*, or here"),
        (("7b", "--mesh.fsdp", "3"), "needs .* devices, but 8 are available"),
        (("7b", "--devices", "v5e", "--mesh.fsdp", "3"), "batch_size 256 is not divisible by the 3 shards"),
        (("7b", "--devices", "v5e", "--mesh.fsdp", "0"), "mesh.fsdp and mesh.tensor at least 1"),
        (("vision_stage1",), "model: no such model directory; give one with --model, or a size: --model 7b"),
        (("vision_stage1", "--model", "7b", "--devices", "v5e", "--exact"), "leave out --devices"),
        (("vision_stage1", "--model", "7b", "--trainable", "vidoe/*"), "matches no parameter"),
    ],
)
def test_errors_are_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message) as stop:
        cli.main(["memory", *arguments])
    assert "\n" not in stop.value.code


@pytest.mark.slow
def test_memory_in_a_process_prints_and_its_arithmetic_imports_no_jax():
    """It takes seconds and the memory of JAX; no weights are loaded. The estimate alone does not even import JAX."""
    command = [str(Path(sys.executable).parent / "vllama"), "memory", "13b", "--devices", "v5p"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True
    )
    assert "13b on 1 × v5p" in done.stdout
    code = "import sys, vllama_jax.memory.estimate; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
