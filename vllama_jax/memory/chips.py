"""Figures of TPU chips and GPUs: memory, peak FLOP/s, and bandwidth of memory and network.

Importing this file imports no jax.
"""

import dataclasses
from typing import Any, Literal

GIB = 2**30
GIGA = 10**9
GPU_SHARE = 0.75  # share of a GPU's memory that JAX preallocates; XLA_CLIENT_MEM_FRACTION changes it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Figures of one chip. A peak figure is 0 where this table has none.

    Attributes:
        name: As topologies and `vllama memory` have it.
        platform: As JAX names it.
        memory_bytes: Memory in bytes, from the manufacturer's data sheet.
        hbm_bytes: Memory that a program can use.
        per_host: Chips on a host.
        device_kinds: How JAX's names of these devices start (`device_kind`).
        flops: Dense bfloat16 FLOP/s.
        hbm_bandwidth: Bytes/s.
        link_bandwidth: Bytes/s in one direction: of one link between TPU chips, or of a GPU's NVLink.
        host_bandwidth: Bytes/s in one direction from a GPU to other hosts; 0 for TPUs, whose links connect all hosts.
        clock: Hz, for XLA's estimates in cycles; 0 where XLA gives none.
    """

    name: str
    platform: Literal["tpu", "gpu"]
    memory_bytes: int
    hbm_bytes: int
    per_host: int
    device_kinds: tuple[str, ...] = ()
    flops: float = 0
    hbm_bandwidth: float = 0
    link_bandwidth: float = 0
    host_bandwidth: float = 0
    clock: float = 0


def _gpu(name: str, gigabytes: int, *device_kinds: str, **figures: float) -> Chip:
    """Make the entry of a GPU, of which a server has 8."""
    return Chip(
        name=name,
        platform="gpu",
        memory_bytes=gigabytes * GIGA,
        hbm_bytes=int(GPU_SHARE * gigabytes * GIGA),
        per_host=8,
        device_kinds=device_kinds,
        **figures,
    )


def _tpu(name: str, gigabytes: int, *device_kinds: str, hbm_bytes: float, **figures: float) -> Chip:
    """Make the entry of a TPU chip, of which a host of a slice has 4."""
    return Chip(
        name=name,
        platform="tpu",
        memory_bytes=gigabytes * GIGA,
        hbm_bytes=int(hbm_bytes),
        per_host=4,
        device_kinds=device_kinds,
        **figures,
    )


# GPUs. NVIDIA's data sheets, of SXM models: dense FLOP/s, memory bandwidth, NVLink (H100 and H200: 900 GB/s in both
# directions), and one 400 Gbit/s network adapter for each GPU as in DGX H100. L4 and RTX have no JAX names here, as the
# names of faster models start in the same way ("NVIDIA L40S").
# TPUs. FLOP/s and HBM bandwidth: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e (read in November 2026; the page of
# v6e rounds its 1,640 GB/s to 1,600), and /v4. Usable HBM: the limit in the compiler's out-of-memory message (libtpu
# 0.0.42); for v4, the data sheet's.
# Links: the table of ICI bandwidth in "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus); the data sheets'
# 400, 1,200 and 800 GB/s count both directions of all 4, 6 and 4 links, at 50 or 100 GB/s each before protocol.
# Clock: FLOP/s over 2 × 128² × the MXUs of 128² that a chip has (4 and 8): 1.5 and 1.75 GHz. v6e: assumed as v5p's.
# The first entry whose JAX name fits a device is used: A100-40 and v5p have short names, so they follow the others.
_HOPPER_NETWORK = {"link_bandwidth": 450e9, "host_bandwidth": 50e9}
CHIPS = {
    chip.name: chip
    for chip in (
        _gpu("H200", 141, "NVIDIA H200", flops=989e12, hbm_bandwidth=4800e9, **_HOPPER_NETWORK),
        _gpu("H100", 80, "NVIDIA H100", flops=989e12, hbm_bandwidth=3350e9, **_HOPPER_NETWORK),
        _gpu("A100-80", 80, "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB", flops=312e12, hbm_bandwidth=2039e9),
        _gpu("A100-40", 40, "NVIDIA A100", flops=312e12, hbm_bandwidth=1555e9),
        _gpu("L4", 24),
        _gpu("RTX-4090", 24),
        _gpu("RTX-3090", 24),
        _tpu("v4", 32, "TPU v4", hbm_bytes=32 * GIGA, flops=275e12, hbm_bandwidth=1228e9),
        _tpu(
            *("v5e", 16, "TPU v5 lite", "TPU v5e"),
            hbm_bytes=15.75 * GIB,
            flops=197e12,
            hbm_bandwidth=819e9,
            link_bandwidth=45e9,
            clock=1.5e9,
        ),
        _tpu(
            *("v5p", 95, "TPU v5p", "TPU v5"),
            hbm_bytes=95.74 * GIB,
            flops=459e12,
            hbm_bandwidth=2765e9,
            link_bandwidth=90e9,
            clock=1.75e9,
        ),
        _tpu(
            *("v6e", 32, "TPU v6 lite", "TPU v6e"),
            hbm_bytes=31.25 * GIB,
            flops=918e12,
            hbm_bandwidth=1640e9,
            link_bandwidth=90e9,
            clock=1.75e9,
        ),
    )
}


def find_chip(device: Any) -> Chip | None:
    """Return the chip of a `jax.Device` that has peak figures; None for others, such as CPUs."""
    return next((chip for chip in CHIPS.values() if device.device_kind.startswith(chip.device_kinds)), None)
