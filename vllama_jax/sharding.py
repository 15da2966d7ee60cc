"""Where every array lives: the mesh, and one table from logical axis names to mesh axes.

Weights carry names ("embed", "heads", …) as metadata beside them (nn/layers.py: `axes`); activations are constrained
by the same names inside the model. The table below is the only place where a name meets a device.
"""

import contextlib
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from vllama_jax.errors import ConfigError, format_error

AXIS_NAMES = "logical_axes"  # the key under which a weight's metadata holds its axis names

# Measured for 16 to 256 chips: batch over data and fsdp, weights gathered layer by layer over fsdp.
MESH_AXES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with the axes data, fsdp and tensor over all devices.

    Its axes are Auto (the compiler partitions); `jax.make_mesh` would make them Explicit. A mesh axis may take a part
    of an axis of the TPU's torus, which `jax.make_mesh` refuses for v5p and v6e: (2, 8, 1) on v6e:4x4.

    Args:
        data: Devices of the axis data.
        fsdp: Devices of the axis fsdp.
        tensor: Devices of the axis tensor.
        devices: All devices of this run unless given.

    Raises:
        ConfigError: The product of the axes is not the number of devices, or the devices cannot be arranged so.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = (data, fsdp, tensor)
    if math.prod(shape) != len(devices):
        raise ConfigError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} has {math.prod(shape)} places for {len(devices)} devices"
        )
    return Mesh(arrange_devices(shape, devices), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)


def arrange_devices(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arrange devices in a grid of a mesh's shape so that neighbors of an axis are neighbors on the network.

    Raises ConfigError for devices of several TPU slices, and for those that JAX cannot arrange.
    """
    count = len({getattr(device, "slice_index", 0) for device in devices})
    if count > 1:
        raise ConfigError(f"the {len(devices)} devices are in {count} TPU slices; a mesh needs devices of one slice")
    try:
        return mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        axes = "data={} fsdp={} tensor={}".format(*shape)
        kind = f"{len(devices)} {devices[0].device_kind} devices"
        raise ConfigError(f"JAX cannot arrange {kind} in a mesh {axes}: {format_error(error)}") from error


def partition_spec(
    shape: Sequence[int], names: Sequence[str | None], mesh: Mesh | AbstractMesh, *, fsdp: bool = True
) -> PartitionSpec:
    """Names to mesh axes for one array. Names stand for the last axes: stacked layers come first and have none.

    A dimension that its mesh axes do not divide is replicated. `fsdp=False` leaves weights whole over fsdp (decoding).
    """
    names = (None,) * (len(shape) - len(names)) + tuple(names)
    spec = []
    for size, name in zip(shape, names, strict=True):
        axes, places = _mesh_axes(name, mesh, fsdp=fsdp)
        spec.append(axes if axes and size % places == 0 else None)
    return PartitionSpec(*spec)


def _mesh_axes(name: str | None, mesh: Mesh | AbstractMesh, *, fsdp: bool) -> tuple[tuple[str, ...], int]:
    """The mesh axes that a named dimension goes over, and how many places they make."""
    wanted = MESH_AXES.get(name, ()) if name is not None else ()
    axes = tuple(axis for axis in wanted if axis in mesh.shape and (fsdp or name == "batch" or axis != "fsdp"))
    return axes, math.prod(mesh.shape[axis] for axis in axes)


def shard_abstract(abstract_state: nnx.State, mesh: Mesh | AbstractMesh, *, fsdp: bool = True) -> nnx.State:
    """An abstract state with every leaf's sharding on it; it serves init, restore and ahead-of-time compiling."""

    def with_sharding(variable: nnx.Variable) -> nnx.Variable:
        leaf = variable.get_value()
        sharding = weight_sharding(variable, mesh, fsdp=fsdp)
        return variable.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))

    return jax.tree.map(with_sharding, abstract_state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def weight_sharding(variable: nnx.Variable, mesh: Mesh | AbstractMesh, *, fsdp: bool = True) -> NamedSharding:
    """Where a weight lives, by the names beside it."""
    names = variable.get_metadata().get(AXIS_NAMES, ())
    return NamedSharding(mesh, partition_spec(variable.get_value().shape, names, mesh, fsdp=fsdp))


def get_mesh(module: nnx.Module) -> Mesh | None:
    """The mesh that a module's weights lie on; None on a single device."""
    sharding = jax.tree.leaves(module)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Makes `mesh` the current one, for the constraints inside the model."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def list_indivisible_axes(abstract_state: nnx.State, mesh: Mesh | AbstractMesh, *, fsdp: bool = True) -> list[str]:
    """One line for each named axis that the mesh does not divide, and that is therefore replicated."""
    lines = set()
    for path, variable in nnx.to_flat_state(abstract_state):
        shape, names = variable.get_value().shape, variable.get_metadata().get(AXIS_NAMES, ())
        for size, name in zip(shape[len(shape) - len(names) :], names, strict=True):
            places = _mesh_axes(name, mesh, fsdp=fsdp)[1]
            if size % places:
                lines.add(f"{path[0]}: {size} {name} over {places} devices does not divide; kept whole on each")
    return sorted(lines)
