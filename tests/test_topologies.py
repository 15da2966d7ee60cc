"""Names of topologies, and figures of chips."""

import pytest

from vllama_jax.aot.topologies import CHIPS, SLICES, parse_topology
from vllama_jax.errors import ConfigError
from vllama_jax.memory.estimate import DEVICES
from vllama_jax.memory.flops import PEAK_FLOPS


@pytest.mark.parametrize(
    ("name", "topology", "count"),
    [
        ("v5e:16x16", "v5e:16x16", 256),
        ("v5litepod-256", "v5e:16x16", 256),
        ("V5LitePod-16", "v5e:4x4", 16),
        ("v5e-1", "v5e:1x1", 1),
        ("v5e:8x4", "v5e:4x8", 32),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p:4x4x4", "v5p:4x4x4", 64),
        ("v6e-256", "v6e:16x16", 256),
        ("trillium-8", "v6e:2x4", 8),
        ("TPU v6e:4x4", "v6e:4x4", 16),
        ("H100:8", "H100:8", 8),
        ("8xh200", "H200:8", 8),
        ("16xH100", "H100:16", 16),
    ],
)
def test_common_names(name, topology, count):
    found = parse_topology(name)
    assert (found.name, found.count) == (topology, count)
    assert parse_topology(found.name) == found


@pytest.mark.parametrize(
    "name", ["v7x", "v4-8", "trillium", "v5e:3x3", "v5p-7", "v5e-0", "H100", "H100:0", "A100:8", ""]
)
def test_unknown_names_are_refused_with_the_list(name):
    with pytest.raises(
        ConfigError, match=r"no topology '.*': choose one of v5e:\{1x1,2x2.*16x16x24\}, .*H200:N"
    ) as error:
        parse_topology(name)
    assert "\n" not in str(error.value)


def test_gpus_fill_their_hosts():
    assert parse_topology("H100:4").sides == (1, 4)
    assert parse_topology("H100:64").sides == (8, 8)
    with pytest.raises(ConfigError, match="12 GPUs are no whole number of hosts with 8"):
        parse_topology("12xH100")


@pytest.mark.parametrize(
    ("name", "group", "gigabytes"),
    [
        ("v5e:16x16", 256, 2 * 2 * 45),  # both axes are rings
        ("v5e:16x16", 16, 2 * 45),
        ("v5e:8x8", 64, 2 * 45),
        ("v5p:4x4x4", 64, 3 * 2 * 90),
        ("v6e:16x16", 256, 2 * 2 * 90),
        ("H100:16", 8, 450),
        ("H100:16", 16, 50),
    ],
)
def test_network_bandwidth(name, group, gigabytes):
    assert parse_topology(name).network_bandwidth(group) == gigabytes * 1e9


def test_chips_agree_with_the_other_tables():
    for name, chip in CHIPS.items():
        assert chip.flops == PEAK_FLOPS[f"TPU {name}" if chip.platform == "tpu" else f"NVIDIA {name}"]
        assert chip.hbm_bytes == pytest.approx(DEVICES[name].bytes * DEVICES[name].usable_fraction, rel=0.1)
        assert (name in SLICES) == (chip.platform == "tpu")
