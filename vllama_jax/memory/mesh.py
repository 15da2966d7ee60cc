"""Choose the mesh of a run whose config sets none: data parallel if all weights fit each device, FSDP otherwise.

Pure data parallel sends only the gradients of the trainable parameters over the network, 0.1 GB a step for 7B. FSDP
gathers all frozen weights layer by layer, twice for the language model and once for the encoders: 29 GB for 7B. How
long that takes depends on the links that a group of chips can use: on v5e-256, groups of 2 use one link of 45 GB/s, and
groups of 256 four of them. The tensor axis is never chosen: it sends activations for each layer, and the frozen weights
need no optimizer state.

On TPUs, the width of a shard should be whole tiles. For 13B on 256 chips it is 5,120 / 256 = 20: XLA copies a gathered
weight of each layer, and stage 2 takes 1.4 times as long as in groups of 128, whose shards have 40.
Importing this file imports no jax.
"""

import dataclasses

from vllama_jax.config import VideoLlamaConfig
from vllama_jax.memory.estimate import Device, estimate_training, verdict
from vllama_jax.memory.torus import count_links
from vllama_jax.train.config import MeshConfig, TrainConfig, resolve_mesh

TOLERANCE = 1.2  # larger groups have smaller pieces and more steps, whose latency is not counted
TILE = 8  # sublanes of a TPU's vector registers


def choose_mesh(
    model: VideoLlamaConfig,
    run: TrainConfig,
    device: Device,
    count: int,
    *,
    length: int = 0,
    sides: tuple[int, ...] = (),
) -> tuple[MeshConfig, str]:
    """Choose the axes that a run's mesh leaves open.

    With `fsdp` 0, it is 1 if state, frozen weights and activations fit a device and leave a tenth of it free
    (`estimate.MARGIN`). Otherwise it is the smallest size that fits and gathers in nearly the shortest time, so that
    data × fsdp × tensor are all devices. If none fits, it is the largest. On a TPU slice, sizes with shards that are
    not whole tiles are the last choice.

    Args:
        model: The model that is trained.
        run: The run.
        device: Each of the devices.
        count: Number of devices.
        length: Tokens of a sequence; 0 for the longest that the run may have.
        sides: Chips along each axis of a TPU slice; () for other devices, where the smallest size gathers fastest.

    Returns:
        The mesh without open axes, and why it was chosen: "" where the run's config left nothing open.

    Raises:
        ConfigError: The batch does not divide, or a trainable pattern matches nothing.
    """
    if run.mesh.fsdp:
        return resolve_mesh(run.mesh, count), ""
    places = max(count // run.mesh.tensor, 1)
    if run.mesh.data:
        left = 1 if places % run.mesh.data else places // run.mesh.data
        return dataclasses.replace(run.mesh, fsdp=left), "the devices that data leaves"
    sizes = [size for size in range(1, places + 1) if places % size == 0]
    meshes = [dataclasses.replace(run.mesh, data=places // size, fsdp=size) for size in sizes]
    need = estimate_training(model, "", run, meshes[0], device, length)
    if verdict(need, device) == "fits":
        return meshes[0], f"the weights fit each device: {need.device_total / 1e9:.1f} GB"
    needs = {1: need} | {mesh.fsdp: estimate_training(model, "", run, mesh, device, length) for mesh in meshes[1:]}
    fitting = [size for size in sizes if verdict(needs[size], device) == "fits"]
    if not fitting:
        return meshes[-1], f"it is not expected to fit: {needs[sizes[-1]].device_total / 1e9:.1f} GB"
    whole = [size for size in fitting if not sides or model.llama.width % (size * TILE) == 0]
    size = _fastest_gather(whole or fitting, sides)
    reason = f"fewer than {fitting[0]} would not fit"
    if size != fitting[0]:
        reason += f", and {size} gather weights faster"
    return meshes[sizes.index(size)], f"{reason}: {needs[size].device_total / 1e9:.1f} GB"


def _fastest_gather(sizes: list[int], sides: tuple[int, ...]) -> int:
    """Return the smallest size whose gathers take at most `TOLERANCE` times the time of the fastest."""
    times = {size: (size - 1) / size / count_links(sides, size) for size in sizes}
    return next(size for size in sizes if times[size] <= TOLERANCE * min(times.values()))
