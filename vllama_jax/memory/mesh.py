"""The mesh of a run that names none: pure data parallel if all weights fit on each device, FSDP otherwise.

Pure data parallel sends only the gradients of the trainable parameters over the network, 0.1 GB a step for 7B. FSDP
gathers all frozen weights layer by layer, twice for the language model and once for the encoders: 29 GB for 7B. The
tensor axis is never chosen: it sends activations for each layer, and the frozen weights need no optimizer state.
Importing this file imports no jax.
"""

import dataclasses

from vllama_jax.config import VideoLlamaConfig
from vllama_jax.memory.estimate import Device, estimate_training, verdict
from vllama_jax.train.config import MeshConfig, TrainConfig, resolve_mesh


def choose_mesh(
    model: VideoLlamaConfig, run: TrainConfig, device: Device, count: int, length: int = 0
) -> tuple[MeshConfig, str]:
    """Choose the axes that a run's mesh leaves open.

    With `fsdp` 0, it is the smallest size with which state, frozen weights and activations fit a device and leave a
    tenth of it free (`estimate.MARGIN`), so that data × fsdp × tensor are all devices. If none fits, it is the largest.

    Args:
        model: The model that is trained.
        run: The run.
        device: Each of the devices.
        count: Number of devices.
        length: Tokens of a sequence; 0 for the longest that the run may have.

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
    for mesh in meshes:
        need = estimate_training(model, "", run, mesh, device, length)
        if verdict(need, device) == "fits":
            reason = "the weights fit each device" if mesh.fsdp == 1 else f"fewer than {mesh.fsdp} would not fit"
            return mesh, f"{reason}: {need.device_total / 1e9:.1f} GB"
    return meshes[-1], f"it is not expected to fit: {need.device_total / 1e9:.1f} GB"
