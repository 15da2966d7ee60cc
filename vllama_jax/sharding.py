"""Device meshes and sharding: one table maps the logical axis names of arrays to mesh axes.

Parameters have axis names ("embed", "heads", …) in their metadata (nn/layers.py: `axis_metadata`). The network
constrains activations with the same names. `MESH_AXES` is the only mapping from names to mesh axes.
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

AXIS_NAMES = "logical_axes"  # key of the axis names in a parameter's metadata

# The fastest layout of those measured for 16 to 256 chips: the batch is sharded over data and fsdp, weights over fsdp,
# and they are gathered layer by layer.
MESH_AXES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Create a device mesh with the axes "data", "fsdp" and "tensor".

    The axes have the type `Auto`, so the compiler partitions the computation; the default of `jax.make_mesh` is
    `Explicit`. A mesh axis may take a part of an axis of a TPU's torus, which `jax.make_mesh` refuses for v5p and v6e:
    (2, 8, 1) on v6e:4x4.

    Args:
        data: Size of the axis that divides the batch.
        fsdp: Size of the axis that divides both the batch and the parameters.
        tensor: Size of the axis that divides heads and hidden dimensions.
        devices: The devices of the mesh; all devices by default.

    Raises:
        ConfigError: The product of the sizes is not the number of devices, or JAX cannot arrange the devices so.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = (data, fsdp, tensor)
    if math.prod(shape) != len(devices):
        raise ConfigError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} needs {math.prod(shape)} devices, but {len(devices)} are "
            "available"
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
    """Map the logical axis names of an array to mesh axes.

    A dimension that is not a multiple of the number of its shards is replicated.

    Args:
        shape: The shape of the array.
        names: Names of its last axes. Leading axes, such as the one of stacked layers, have no name.
        mesh: The device mesh.
        fsdp: Whether to shard parameters over fsdp. Decoding replicates them over it.
    """
    names = (None,) * (len(shape) - len(names)) + tuple(names)
    spec = []
    for size, name in zip(shape, names, strict=True):
        axes, num_shards = _mesh_axes(name, mesh, fsdp=fsdp)
        spec.append(axes if axes and size % num_shards == 0 else None)
    return PartitionSpec(*spec)


def _mesh_axes(name: str | None, mesh: Mesh | AbstractMesh, *, fsdp: bool) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes that a named dimension is sharded over, and the number of its shards."""
    candidates = MESH_AXES.get(name, ()) if name is not None else ()
    axes = tuple(axis for axis in candidates if axis in mesh.shape and (fsdp or name == "batch" or axis != "fsdp"))
    return axes, math.prod(mesh.shape[axis] for axis in axes)


def shard_abstract(abstract_state: nnx.State, mesh: Mesh | AbstractMesh, *, fsdp: bool = True) -> nnx.State:
    """Add a sharding to each leaf of an abstract state.

    The result is used to initialize or restore weights, and to compile ahead of time.

    Args:
        abstract_state: A state whose leaves are `jax.ShapeDtypeStruct`.
        mesh: The device mesh.
        fsdp: Whether to shard parameters over fsdp.
    """

    def with_sharding(variable: nnx.Variable) -> nnx.Variable:
        leaf = variable.get_value()
        sharding = weight_sharding(variable, mesh, fsdp=fsdp)
        return variable.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))

    return jax.tree.map(with_sharding, abstract_state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def weight_sharding(variable: nnx.Variable, mesh: Mesh | AbstractMesh, *, fsdp: bool = True) -> NamedSharding:
    """Return the sharding of a parameter, from the axis names in its metadata."""
    names = variable.get_metadata().get(AXIS_NAMES, ())
    return NamedSharding(mesh, partition_spec(variable.get_value().shape, names, mesh, fsdp=fsdp))


def get_mesh(module: nnx.Module) -> Mesh | None:
    """Return the mesh that a module's parameters are sharded over; None if they are on a single device."""
    sharding = jax.tree.leaves(module)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def get_platform(module: nnx.Module) -> str:
    """Return the platform of the devices that hold a module's weights: "cpu", "gpu" or "tpu"."""
    return next(iter(jax.tree.leaves(module)[0].devices())).platform


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Return a context manager that sets the current mesh, which sharding constraints in the network apply to.

    Args:
        mesh: The mesh; None changes nothing.
    """
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def list_indivisible_axes(abstract_state: nnx.State, mesh: Mesh | AbstractMesh, *, fsdp: bool = True) -> list[str]:
    """List the dimensions that are replicated because the mesh does not divide them, as one message for each.

    Args:
        abstract_state: A state of a network; only its shapes and axis names are used.
        mesh: The device mesh.
        fsdp: Whether parameters are sharded over fsdp.
    """
    messages = set()
    for path, variable in nnx.to_flat_state(abstract_state):
        shape, names = variable.get_value().shape, variable.get_metadata().get(AXIS_NAMES, ())
        for size, name in zip(shape[len(shape) - len(names) :], names, strict=True):
            num_shards = _mesh_axes(name, mesh, fsdp=fsdp)[1]
            if size % num_shards:
                messages.add(f"{path[0]}: {name} ({size}) is not divisible by {num_shards} devices and is replicated")
    return sorted(messages)
