"""Entries of `vllama memory` computed by hand for the 7B model.

LLaMA has 6,738,415,616 parameters, width 4096 and 32 layers.
"""

import dataclasses

import pytest

from vllama_jax.cli._model_config import SIZES
from vllama_jax.config import GenerationConfig, tiny
from vllama_jax.data.config import DataConfig, DatasetConfig
from vllama_jax.memory import estimate
from vllama_jax.memory.estimate import DEVICES, Device, MemoryEstimate
from vllama_jax.train.config import MeshConfig, TrainConfig
from vllama_jax.train.config_files import load_config

GIGA = 10**9
ALONE, SPLIT = MeshConfig(data=1), MeshConfig(data=1, fsdp=8)
LAYER = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096  # parameters in one layer of LLaMA
LARGEST = 32 * 4096 * 11008  # its largest array, one stacked MLP matrix
CPU = Device("cpu", 16 * GIGA, 1.0, 8, is_host=True)


def train_need(mesh: MeshConfig = ALONE, device: Device = DEVICES["H100"], rows: int = 4, **options) -> MemoryEstimate:
    """Estimate a run on cached features with examples of 128 tokens, of which 32 are media tokens."""
    config = TrainConfig(
        model="m",
        datasets=(DatasetConfig(path="d"),),
        steps=10,
        batch_size=rows * mesh.data * mesh.fsdp,
        mesh=mesh,
        **{"data": DataConfig(feature_cache="f"), **options},
    )
    return estimate.estimate_training(SIZES["7b"](), "run", config, mesh, device, 128)


# Bytes of a row: features of 8 frames, ids, is_media, its length, and a position and a target for each text token.
ROW = 8 * 32 * 768 * 2 + 128 * 4 + 128 + 4 + 96 * (4 + 4)


@pytest.mark.parametrize(("mesh", "accum_steps", "gathered"), [(ALONE, 1, 1), (SPLIT, 8, 2)])
def test_training_entries_of_a_device(mesh, accum_steps, gathered):
    """With sharded weights, the next layer is gathered while the current one is computed."""
    device = train_need(mesh).device
    assert device["llama"] == pytest.approx(2 * 6_738_415_616 / accum_steps, rel=1e-3)
    assert device["batch"] == 4 * ROW
    assert device["saved activations"] == 32 * 4 * 128 * 4096 * 2
    assert device["gathered weights"] == gathered * 2 * LAYER


@pytest.mark.parametrize(("devices", "hosts"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_hosts_follow_from_the_number_of_devices(devices, hosts):
    """A v5e host has four chips. One batch is in use and four are prefetched."""
    host = train_need(MeshConfig(data=devices), DEVICES["v5e"]).host
    assert host["prefetched batches"] == 5 * (4 * devices * ROW // hosts)


@pytest.mark.parametrize("processes", [0, 3])
def test_each_decoding_process_needs_memory(processes):
    assert (
        train_need(data=DataConfig(feature_cache="f", num_workers=processes)).host["program"]
        == (1 + processes) * 2 * GIGA
    )


def test_loading_to_an_accelerator_needs_one_read_of_weights_on_the_host():
    """At most 4 GB, or one array in float32; all weights of a smaller model."""
    large = estimate.estimate_chat(SIZES["7b"](), ALONE, DEVICES["H100"]).host["loading weights"]
    assert large == (LARGEST * 4 // GIGA + 1) * GIGA == 6 * GIGA
    small = estimate.estimate_chat(tiny(), ALONE, DEVICES["H100"])
    assert small.host["loading weights"] == sum(
        size for entry, size in small.device.items() if entry not in ("KV cache", "activations")
    )


def test_loading_to_a_cpu_needs_one_weight():
    """The CPU's memory is the host's, so one array is there twice: the largest, ImageBind's patch kernel."""
    need = estimate.estimate_chat(tiny(), ALONE, CPU)
    assert need.host["loading weights"] == 2 * (3 * 14 * 14) * 64 * 4


def test_chat_entries_of_cache_and_temporaries():
    """Layers are unstacked one array at a time, before the cache exists; beams are reordered in the cache."""
    one, beams = (
        estimate.estimate_chat(
            SIZES["7b"](), ALONE, DEVICES["H100"], length=100, generation=GenerationConfig(num_beams=n)
        )
        for n in (1, 16)
    )
    cache = 448 * 32 * 2 * 4096 * 2  # 128 positions and 320 new tokens; keys and values in bfloat16
    assert (one.device["KV cache"], one.device["activations"]) == (cache, 2 * LARGEST - cache)
    assert (beams.device["KV cache"], beams.device["activations"]) == (16 * cache, 16 * cache)


def test_suggested_flags_use_the_fewest_accumulation_steps():
    model, run = SIZES["7b"](), load_config("vision_stage2")[0]
    mine = Device("mine", 20 * GIGA + GIGA // 2, 1.0, 1)

    def verdict(accum_steps: int) -> str:
        return estimate.verdict(
            estimate.estimate_training(model, "", dataclasses.replace(run, grad_accum_steps=accum_steps), ALONE, mine),
            mine,
        )

    assert [verdict(accum_steps) for accum_steps in (1, 4, 8, 32)] == ["does not fit", "tight", "fits", "fits"]
    need = estimate.estimate_training(model, "", run, ALONE, mine)
    assert estimate.suggest_flags(model, need, run, ALONE, mine) == "--grad-accum-steps 8"


def test_device_memory_is_the_manufacturers():
    """Gigabytes, the fraction that JAX uses, and devices per host."""
    found = {name: (device.bytes // GIGA, device.usable_fraction, device.per_host) for name, device in DEVICES.items()}
    gpus = {"H200": 141, "H100": 80, "A100-80": 80, "A100-40": 40, "L4": 24, "RTX-4090": 24, "RTX-3090": 24}
    tpus = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
    assert found == {name: (size, 0.75, 8) for name, size in gpus.items()} | {
        name: (size, 1.0, 4) for name, size in tpus.items()
    }


def test_longest_lengths_of_conversations_and_captions():
    """A caption of 32 tokens follows BOS and 32 media tokens; an instruction takes 64 more."""
    stage1, audio = load_config("vision_stage1")[0], load_config("audio_stage1")[0]
    lengths = dataclasses.replace(stage1.data, length_buckets=tuple(range(1, 700)))

    def longest(run: TrainConfig, **text) -> int:
        dataset = dataclasses.replace(run.datasets[1], text=dataclasses.replace(run.datasets[1].text, **text))
        return estimate.longest_example_length(
            SIZES["7b"](), dataclasses.replace(run, datasets=(dataset,), data=lengths)
        )

    assert longest(stage1) == 32 + 1 + 32
    assert longest(audio) == 32 + 1 + 8
    assert longest(stage1, instructions=("Look.",)) == 32 + 1 + 32 + 64
    assert longest(stage1, layout="conversation", max_length=512) == 512
