"""The mesh that a run gets which names none."""

import dataclasses
import types

import jax
import pytest

from vllama_jax.config import tiny, video_llama_7b, video_llama_13b
from vllama_jax.data.config import DatasetConfig
from vllama_jax.errors import ConfigError
from vllama_jax.memory import mesh
from vllama_jax.memory.estimate import DEVICES, GIGA, Device, estimate_training, verdict
from vllama_jax.memory.mesh import choose_mesh
from vllama_jax.memory.torus import count_links, torus_sides
from vllama_jax.train import setup
from vllama_jax.train.config import AUTO_MESH, MeshConfig, TrainConfig


def run_of(batch_size: int = 512, **options) -> TrainConfig:
    return TrainConfig(model="m", datasets=(DatasetConfig(path="d"),), steps=1, batch_size=batch_size, **options)


def test_a_run_names_no_mesh_unless_told():
    assert run_of().mesh == AUTO_MESH == MeshConfig(data=0, fsdp=0, tensor=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "device", "count", "mesh"),
    [
        (video_llama_7b, "v5p", 64, (64, 1)),
        (video_llama_13b, "v5p", 64, (64, 1)),
        (video_llama_7b, "v6e", 16, (16, 1)),
        (video_llama_7b, "H100", 8, (8, 1)),
        (video_llama_7b, "v5e", 16, (8, 2)),
        (video_llama_13b, "v5e", 256, (64, 4)),
    ],
)
def test_the_fewest_devices_hold_the_weights_that_can(model, device, count, mesh):
    chosen, reason = choose_mesh(model(), run_of(), DEVICES[device], count, length=72)
    assert (chosen.data, chosen.fsdp, chosen.tensor) == (*mesh, 1)
    assert reason.startswith("the weights fit each device" if mesh[1] == 1 else f"fewer than {mesh[1]} would not fit")
    need = estimate_training(model(), "", run_of(), chosen, DEVICES[device], 72)
    assert verdict(need, DEVICES[device]) == "fits"


@pytest.mark.parametrize(
    ("sides", "fsdp"),
    [
        ((4, 4), 2),  # two chips: half of the bytes over one link; 16: nearly all over two
        ((8, 8), 2),
        ((16, 16), 256),  # nearly all over four: half the time
    ],
)
def test_wider_groups_are_chosen_where_they_gather_faster(sides, fsdp):
    count = sides[0] * sides[1]
    chosen, reason = choose_mesh(video_llama_7b(), run_of(), DEVICES["v5e"], count, length=72, sides=sides)
    assert chosen == MeshConfig(data=count // fsdp, fsdp=fsdp)
    assert ("faster" in reason) == (fsdp > 2)


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "fsdp"), [(8, 32), (8192, 256)])
def test_shards_of_whole_tiles_are_preferred_on_a_tpu_slice(tile: int, fsdp: int, monkeypatch: pytest.MonkeyPatch):
    """5,120 / 256 is 20, not a multiple of 8: of the others, groups of 32 have as many links as any."""
    monkeypatch.setattr(mesh, "TILE", tile)
    chosen, reason = choose_mesh(video_llama_13b(), run_of(), DEVICES["v5e"], 256, length=72, sides=(16, 16))
    assert chosen == MeshConfig(data=256 // fsdp, fsdp=fsdp)
    assert f"{fsdp} gather weights faster" in reason


@pytest.mark.parametrize(
    ("sides", "group", "links"),
    [
        ((16, 16), 256, 4),
        ((16, 16), 128, 3),  # a ring, and a line of 8
        ((16, 16), 16, 2),
        ((16, 16), 2, 1),
        ((8, 16), 128, 3),
        ((8, 8), 64, 2),
        ((4, 4, 4), 64, 6),
        ((4, 4, 4), 2, 1),
        ((2, 2, 4), 16, 3),
        ((), 8, 1),
        ((4, 4), 1, 0),
    ],
)
def test_links_of_a_group(sides, group, links):
    assert count_links(sides, group) == links


def test_sides_follow_from_the_coordinates_of_devices():
    chips = [types.SimpleNamespace(coords=(x, y, 0), device_kind="TPU v5 lite") for x in range(4) for y in range(8)]
    assert torus_sides(chips) == (4, 8)
    cube = [types.SimpleNamespace(coords=(x, 0, 0), device_kind="TPU v5") for x in range(2)]
    assert torus_sides(cube) == (2, 1, 1)
    assert torus_sides(jax.devices()) == ()


def test_the_largest_fsdp_is_taken_where_none_fits():
    chosen, reason = choose_mesh(video_llama_13b(), run_of(), Device("mine", GIGA, 1.0, 8), 8, length=72)
    assert chosen == MeshConfig(data=1, fsdp=8)
    assert "not expected to fit" in reason


def test_axes_that_are_named_stay():
    device = DEVICES["v5e"]
    assert choose_mesh(tiny(), run_of(mesh=MeshConfig(fsdp=4)), device, 8)[0] == MeshConfig(data=2, fsdp=4)
    assert choose_mesh(tiny(), run_of(mesh=MeshConfig(data=2, fsdp=0)), device, 8)[0] == MeshConfig(data=2, fsdp=4)
    assert choose_mesh(tiny(), run_of(mesh=MeshConfig(data=3, fsdp=0)), device, 8)[0] == MeshConfig(data=3)
    two = dataclasses.replace(AUTO_MESH, tensor=2)
    assert choose_mesh(tiny(), run_of(mesh=two), device, 8)[0] == MeshConfig(data=4, fsdp=1, tensor=2)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"batch_size 12 is not divisible by the 8 shards"):
        choose_mesh(tiny(), run_of(12), DEVICES["v5e"], 8)


def test_training_uses_all_devices_and_says_why():
    mesh, reason = setup.make_run_mesh(run_of(8), tiny())
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    assert reason.startswith("the weights fit each device: ")


def test_a_mesh_that_was_recorded_by_an_earlier_version_stays():
    mesh, reason = setup.make_run_mesh(run_of(8, mesh=MeshConfig(data=0, fsdp=1, tensor=1)), tiny())
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    assert not reason
