"""The network of a TPU slice: how many links of a chip a collective can use.

Importing this file imports no jax.
"""

from collections.abc import Sequence
from typing import Any

FULL_AXIS = 16  # chips of an axis of v5e and v6e whose ends are connected: only that of a whole pod
CUBE_SIDE = 4  # chips: slices of v5p that consist of whole cubes have connected ends on all axes


def torus_sides(devices: Sequence[Any]) -> tuple[int, ...]:
    """Return the chips along each axis of the slice that devices are in; () for devices without coordinates."""
    coordinates = [getattr(device, "coords", None) for device in devices]
    if not all(coordinates):
        return ()
    sides = [max(axis) - min(axis) + 1 for axis in zip(*coordinates, strict=True)]
    flat = "lite" in devices[0].device_kind  # v5e and v6e: the third coordinate is always 0
    return tuple(sides[:2] if flat else sides)


def count_links(sides: Sequence[int], group: int) -> int:
    """Count the links that bring bytes into a chip, in a collective over groups of `group` chips.

    A mesh axis takes whole axes of the torus first, the longest first, and then a part of one. An axis whose ends are
    connected is a ring, and both links of a chip bring new bytes; of a line, the chips at its ends have one link, and
    all wait for them.

    Args:
        sides: Chips along each axis of the slice; () where the network is not a torus, which counts as one link.
        group: Chips of a group.
    """
    links, left = 0, group
    for side in sorted(sides, reverse=True):
        if side > 1 and left % side == 0:
            links += 1 + _is_ring(sides, side)
            left //= side
    return links + (left > 1)


def _is_ring(sides: Sequence[int], side: int) -> bool:
    if len(sides) == 3:
        return all(each % CUBE_SIDE == 0 for each in sides)
    return side == FULL_AXIS
