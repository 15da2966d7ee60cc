"""Topologies: names of TPU slices and GPU hosts, and peak figures of their chips.

Importing this file imports no jax.
"""

import dataclasses
import math
import re
from typing import Literal

from vllama_jax.errors import ConfigError
from vllama_jax.memory.torus import count_links

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak figures of one chip.

    Attributes:
        name: As topologies and `vllama memory` have it.
        platform: As JAX names it.
        flops: Dense bfloat16 FLOP/s.
        hbm_bytes: Memory that a program can use.
        hbm_bandwidth: Bytes/s.
        link_bandwidth: Bytes/s in one direction: of one link between TPU chips, or of a GPU's NVLink.
        host_bandwidth: Bytes/s in one direction from a GPU to other hosts; 0 for TPUs, whose links connect all hosts.
        clock: Hz, for XLA's estimates in cycles; 0 where XLA gives none.
        per_host: Chips on a host.
    """

    name: str
    platform: Literal["tpu", "gpu"]
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float = 0
    clock: float = 0
    per_host: int = 4


# TPUs. FLOP/s and HBM bandwidth: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e (read in November 2026; the page of
# v6e rounds its 1,640 GB/s to 1,600). Usable HBM: the limit in the compiler's out-of-memory message (libtpu 0.0.42).
# Links: the table of ICI bandwidth in "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus); the data sheets'
# 400, 1,200 and 800 GB/s count both directions of all 4, 6 and 4 links, at 50 or 100 GB/s each before protocol.
# Clock: FLOP/s over 2 × 128² × the MXUs of 128² that a chip has (4 and 8): 1.5 and 1.75 GHz. v6e: assumed as v5p's.
# GPUs. NVIDIA's data sheets of H100 SXM and H200 SXM: dense FLOP/s, HBM3 and HBM3e, NVLink 900 GB/s in both directions,
# and one 400 Gbit/s network adapter for each GPU as in DGX H100. JAX uses 75 % of a GPU's memory (memory/estimate.py).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            platform="tpu",
            flops=197e12,
            hbm_bytes=int(15.75 * GIB),
            hbm_bandwidth=819e9,
            link_bandwidth=45e9,
            clock=1.5e9,
        ),
        Chip(
            name="v5p",
            platform="tpu",
            flops=459e12,
            hbm_bytes=int(95.74 * GIB),
            hbm_bandwidth=2765e9,
            link_bandwidth=90e9,
            clock=1.75e9,
        ),
        Chip(
            name="v6e",
            platform="tpu",
            flops=918e12,
            hbm_bytes=int(31.25 * GIB),
            hbm_bandwidth=1640e9,
            link_bandwidth=90e9,
            clock=1.75e9,
        ),
        Chip(
            name="H100",
            platform="gpu",
            flops=989e12,
            hbm_bytes=int(0.75 * 80e9),
            hbm_bandwidth=3350e9,
            link_bandwidth=450e9,
            host_bandwidth=50e9,
            per_host=8,
        ),
        Chip(
            name="H200",
            platform="gpu",
            flops=989e12,
            hbm_bytes=int(0.75 * 141e9),
            hbm_bandwidth=4800e9,
            link_bandwidth=450e9,
            host_bandwidth=50e9,
            per_host=8,
        ),
    )
}

# Slices that Google Cloud offers, on the pages above. A number after v5p- counts TensorCores, two in each chip.
_FLAT_SLICES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SLICES = {
    "v5e": _FLAT_SLICES,
    "v5p": (
        *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
        *("8x8x16", "8x16x16", "16x16x16", "16x16x24"),
    ),
    "v6e": _FLAT_SLICES,
}
CORES_PER_CHIP = {"v5e": 1, "v5p": 2, "v6e": 1}
# Other names of chips: of Google Cloud's accelerator types, of JAX's device kinds, and of marketing.
ALIASES = {
    **dict.fromkeys(("v5litepod", "v5lite", "tpuv5e", "tpuv5lite"), "v5e"),
    **dict.fromkeys(("tpuv5p", "tpuv5"), "v5p"),
    **dict.fromkeys(("trillium", "tpuv6e", "tpuv6lite", "v6lite"), "v6e"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice, or GPUs on one or several hosts.

    Attributes:
        chip: Each of its chips.
        sides: Chips along each axis of the network; for GPUs, the hosts and the GPUs on each.
    """

    chip: Chip
    sides: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name for libtpu and this package: "v5e:16x16", "H100:8"."""
        if self.chip.platform == "gpu":
            return f"{self.chip.name}:{self.count}"
        return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

    @property
    def count(self) -> int:
        """Number of chips."""
        return math.prod(self.sides)

    def network_bandwidth(self, group: int) -> float:
        """Return the bytes/s that each chip receives in a collective over groups of `group` chips.

        It uses all links of a TPU that a group can use. GPUs of several hosts use the network between hosts.
        """
        if self.chip.platform == "gpu":
            return self.chip.link_bandwidth if group <= self.sides[1] else self.chip.host_bandwidth
        return self.chip.link_bandwidth * max(count_links(self.sides, group), 1)


def list_topologies() -> str:
    """Return the accepted names in a line."""
    slices = [f"{chip}:{{{','.join(sides)}}}" for chip, sides in SLICES.items()]
    return ", ".join([*slices, *(f"{name}:N" for name, chip in CHIPS.items() if chip.platform == "gpu")])


def parse_topology(name: str) -> Topology:
    """Return the topology of a name.

    Args:
        name: In any case: "v5e:16x16"; an accelerator type of Google Cloud, whose number counts chips ("v5litepod-256",
            "v6e-256") or TensorCores ("v5p-128" has 64 chips); "H100:8", "8xH100".

    Raises:
        ConfigError: There is no such topology.
    """
    text = re.sub(r"[ _]", "", name.lower())
    if found := re.fullmatch(r"(\d+)x([a-z]\w+)|([a-z]\w+?)[:-](\d+)", text):
        chip, count = found[2] or found[3], int(found[1] or found[4])
        gpu = next((known for known in CHIPS.values() if known.name.lower() == chip), None)
        if gpu is not None and gpu.platform == "gpu" and count:
            return _gpus(gpu, count, name)
    found = re.fullmatch(r"((?:tpu-?)?v?[a-z0-9]+?(?:-?lite)?)[:-](\d+(?:x\d+)*)", text)
    if found is None:
        raise _unknown(name)
    chip = found[1].replace("-", "")
    chip = ALIASES.get(chip, chip)
    sides = _find_slice(chip, found[2])
    if sides is None:
        raise _unknown(name)
    return Topology(CHIPS[chip], tuple(map(int, sides.split("x"))))


def _gpus(chip: Chip, count: int, name: str) -> Topology:
    if count > chip.per_host and count % chip.per_host:
        raise ConfigError(
            f"topology {name}: {count} GPUs are no whole number of hosts with {chip.per_host}; use a multiple of it"
        )
    hosts = max(count // chip.per_host, 1)
    return Topology(chip, (hosts, count // hosts))


def _find_slice(chip: str, size: str) -> str | None:
    """Find the slice with these sides, in any order, or with this number of cores."""
    for sides in SLICES.get(chip, ()):
        numbers = [int(side) for side in sides.split("x")]
        if "x" in size:
            if sorted(map(int, size.split("x"))) == sorted(numbers):
                return sides
        elif int(size) == math.prod(numbers) * CORES_PER_CHIP[chip]:
            return sides
    return None


def _unknown(name: str) -> ConfigError:
    return ConfigError(f"no topology {name!r}: choose one of {list_topologies()}")
