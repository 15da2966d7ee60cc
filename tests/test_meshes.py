"""Meshes over TPU topologies: of devices that only have coordinates, and of libtpu's where it is installed."""

import dataclasses
import itertools
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from tpu_compiler import compiler_environment, needs_libtpu

from vllama_jax import sharding
from vllama_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class FakeChip:
    """The attributes of a TPU device that JAX arranges devices by."""

    id: int
    coords: tuple[int, ...]
    device_kind: str
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0
    platform: str = "tpu"


def make_chips(kind: str, *sides: int, slice_index: int = 0) -> list[FakeChip]:
    sides = (*sides, 1)[:3]
    places = itertools.product(*map(range, reversed(sides)))
    return [FakeChip(number, place[::-1], kind, 0, slice_index) for number, place in enumerate(places)]


def factorizations(count: int) -> list[tuple[int, int, int]]:
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    pairs = itertools.product(divisors, repeat=2)
    return [(data, fsdp, count // data // fsdp) for data, fsdp in pairs if count % (data * fsdp) == 0]


@pytest.mark.parametrize(
    ("kind", "sides"),
    [
        ("TPU v5 lite", (2, 2)),
        ("TPU v5 lite", (4, 8)),
        ("TPU v6 lite", (4, 4)),
        ("TPU v6 lite", (8, 8)),
        ("TPU v5", (2, 2, 1)),
        ("TPU v5", (4, 4, 4)),
        ("TPU v5", (4, 4, 12)),
    ],
)
def test_every_factorization_is_arranged(kind, sides):
    chips = make_chips(kind, *sides)
    for shape in factorizations(len(chips)):
        grid = sharding.arrange_devices(shape, chips)
        assert grid.shape == shape
        assert sorted(chip.id for chip in grid.flat) == list(range(len(chips)))


def test_a_part_of_a_torus_axis_keeps_neighbors_together():
    """(2, 8, 1) on v6e:4x4: `jax.make_mesh` refuses it."""
    grid = sharding.arrange_devices((2, 8, 1), make_chips("TPU v6 lite", 4, 4))
    for row in grid[:, :, 0]:
        coords = np.array([chip.coords for chip in row])
        assert math.prod(coords.max(axis=0) - coords.min(axis=0) + 1) == 8, "a rectangle of the torus"


def test_devices_of_two_slices_are_refused():
    chips = [*make_chips("TPU v5 lite", 2, 2), *make_chips("TPU v5 lite", 2, 2, slice_index=1)]
    with pytest.raises(ConfigError, match="the 8 devices are in 2 TPU slices"):
        sharding.arrange_devices((2, 4, 1), chips)


def test_devices_that_jax_cannot_arrange_are_refused():
    """A TPU v4 with two devices per chip, as libtpu's topologies show it."""
    cores = [dataclasses.replace(chip, core_on_chip=core) for chip in make_chips("TPU v4", 2, 2, 1) for core in (0, 1)]
    with pytest.raises(ConfigError, match="JAX cannot arrange 8 TPU v4 devices in a mesh data=2 fsdp=4 tensor=1: Cr"):
        sharding.arrange_devices((2, 4, 1), cores)


def test_axes_are_auto_and_named():
    mesh = sharding.make_mesh(2, 2, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "shapes"),
    [
        ("v5e:16x16", [(2, 128, 1), (4, 64, 1), (1, 256, 1), (1, 64, 4)]),
        ("v6e:4x4", [(2, 8, 1), (16, 1, 1)]),
        ("v6e:16x16", [(2, 128, 1), (4, 64, 1), (8, 32, 1), (1, 64, 4), (256, 1, 1)]),
        ("v5p:4x4x4", [(2, 32, 1), (8, 8, 1), (64, 1, 1)]),
        ("v5p:8x8x8", [(4, 128, 1), (8, 64, 1), (512, 1, 1)]),
    ],
)
def test_meshes_of_libtpu_topologies(topology, shapes):
    code = f"""
from jax.experimental import topologies
from vllama_jax.sharding import make_mesh
devices = topologies.get_topology_desc(platform="tpu", topology_name={topology!r}).devices
print([make_mesh(*shape, devices=devices).devices.shape for shape in {shapes!r}])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=compiler_environment(), check=True)
    assert done.stdout.strip() == str(shapes)
