"""Estimate the memory of a chat or a training step on each device and each host, before anything is loaded.

Static memory (weights, optimizer state, batches) follows from shapes, dtypes and shardings, and is exact. Temporary
memory (activations.py) and the memory of hosts are estimates. Importing this module imports no jax.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllama_jax.branches import find_branch, get_branches, get_component, is_within
from vllama_jax.checkpoints.restore import max_concurrent_gb
from vllama_jax.config import GREEDY, NO_LORA, GenerationConfig, LoraConfig, VideoLlamaConfig
from vllama_jax.errors import ConfigError
from vllama_jax.memory.activations import (
    StepShape,
    estimate_encoder,
    estimate_kv_cache,
    estimate_logits,
    estimate_prefill_layer,
    estimate_saved_activations,
    estimate_trained_qformer,
    estimate_training_layer,
)
from vllama_jax.memory.chips import CHIPS, GIGA, GPU_SHARE
from vllama_jax.train.config import MeshConfig, TrainConfig, resolve_mesh, rows_per_shard

if TYPE_CHECKING:
    from jax import Array, ShapeDtypeStruct
    from jax.sharding import AbstractMesh

    from vllama_jax.memory.abstract_run import AbstractRun
    from vllama_jax.train.state import AbstractModel

MARGIN = 0.1  # share of the usable memory that must be free, because temporary memory is an estimate
PROGRAM_BYTES = 2 * GIGA  # Python, libraries and compilation: 1.2 GB in a tiny run, 1.8 GB for 13B on TPUs
DECODER_BYTES = 64 * 10**6  # a decoding thread: twenty frames of 1080p in the codec's format
MAX_FSDP = 64  # the largest fsdp axis that `suggest_flags` tries
INSTRUCTION_TOKENS = 64  # upper bound of the tokens around a caption: instruction, media tags and template


@dataclasses.dataclass(frozen=True)
class Device:
    """A type of device.

    Attributes:
        name: The name.
        bytes: Memory in bytes, from the manufacturer's data sheet.
        usable_fraction: The fraction of the memory that JAX uses.
        per_host: Number of devices of a host.
        is_host: Whether the device is a CPU, whose memory is that of the host.
    """

    name: str
    bytes: int
    usable_fraction: float
    per_host: int
    is_host: bool = False

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """The default dtype of weights and computation."""
        return "float32" if self.is_host else "bfloat16"


DEVICES = {
    chip.name: Device(chip.name, chip.memory_bytes, GPU_SHARE if chip.platform == "gpu" else 1.0, chip.per_host)
    for chip in CHIPS.values()
}


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """The estimated memory of a chat or a run.

    Attributes:
        name: "chat", or the name of the run config.
        description: The size of the batch or the prompt, and the dtype.
        device: Bytes on each device, by component or kind of array.
        host: Bytes on each host, by purpose.
    """

    name: str
    description: str
    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_total(self) -> int:
        """Bytes on each device."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """Bytes on each host."""
        return sum(self.host.values())


def usable_bytes(need: MemoryEstimate, device: Device) -> int:
    """Return the memory that each device has for a use; on a CPU, without the estimated memory of the host."""
    shared = need.host_total // device.per_host if device.is_host else 0
    return int(device.bytes * device.usable_fraction) - shared


def verdict(need: MemoryEstimate, device: Device) -> Literal["fits", "tight", "does not fit"]:
    """Classify whether a use fits a device. "tight" leaves less than a tenth of the memory free, and may fail."""
    available = usable_bytes(need, device)
    if need.device_total > available:
        return "does not fit"
    return "fits" if need.device_total <= (1 - MARGIN) * available else "tight"


def find_device(name: str) -> Device:
    """Return the entry of `DEVICES` with a given name.

    Args:
        name: The name in any spelling, or "here" for the devices of this machine.

    Raises:
        ConfigError: The device is unknown.
    """
    if name == "here":
        return _detect_device()
    devices = {_normalize_name(known): device for known, device in DEVICES.items()}
    if _normalize_name(name) not in devices:
        raise ConfigError(f"unknown device {name!r}; choose one of {', '.join(DEVICES)}, or here")
    return devices[_normalize_name(name)]


def _normalize_name(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum()).removesuffix("gb")


def _detect_device() -> Device:
    """Return the type of the devices that JAX finds on this machine."""
    import jax

    device, count = jax.devices()[0], jax.local_device_count()
    if device.platform == "cpu":
        return Device("cpu", _host_memory() // count, 1.0, count, is_host=True)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise ConfigError(
            f"{device.device_kind} does not report its memory; choose a mesh with --mesh.fsdp, or, to estimate memory, "
            "the device with --devices"
        )
    return Device(device.device_kind, limit, 1.0, count)


def _host_memory() -> int:
    """Return the memory of this machine in bytes, or of the container that the process runs in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(file).read_text().strip() if Path(file).exists() else "max"
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def resolve_device_mesh(mesh: MeshConfig, device: Device) -> MeshConfig:
    """Replace `data: 0` in a mesh by a number of devices.

    Args:
        mesh: The mesh of a run config.
        device: For the devices of this machine, the mesh has all of them; for others, as few as its axes require.

    Raises:
        ConfigError: The mesh does not match the number of devices of this machine.
    """
    if device.name in DEVICES:
        return resolve_mesh(mesh, mesh.fsdp * mesh.tensor)
    import jax

    from vllama_jax.sharding import make_mesh

    mesh = resolve_mesh(mesh, jax.device_count())
    make_mesh(mesh.data, mesh.fsdp, mesh.tensor)
    return mesh


def estimate_training(
    model: VideoLlamaConfig, name: str, run: TrainConfig, mesh: MeshConfig, device: Device, length: int = 0
) -> MemoryEstimate:
    """Estimate the memory of a run, which decodes videos unless it has a feature cache.

    Args:
        model: The model's config.
        name: The name of the run config.
        run: The run config.
        mesh: The device mesh.
        device: The type of the devices.
        length: Tokens of a sequence; 0 for the maximum length of the run.

    Raises:
        ConfigError: A pattern in `trainable` matches no parameter, or the mesh does not divide the batch.
    """
    from vllama_jax.memory.abstract_run import abstract_run

    rows, length = rows_per_shard(run, mesh), length or longest_example_length(model, run)
    run = resolve_compute_dtype(run, device)
    abstract = abstract_run(model, run, _abstract_mesh(mesh), length)
    shape = StepShape(rows=rows, length=length, itemsize=_itemsize(run.compute_dtype), mesh=mesh)
    trainable = _device_bytes(abstract.state.weights)
    needs = {
        **_bytes_by_component(abstract.frozen),
        "trainable parameters": trainable,
        "optimizer state": _device_bytes(abstract.state.opt_state),
        "gradients": (1 + (run.grad_accum_steps > 1)) * trainable + trainable * shape.itemsize // 4,
        "batch": _device_bytes(abstract.batch),
        "saved activations": estimate_saved_activations(model.llama, shape, run.remat_policy),
        **_peak_phase(model, run, shape, abstract.abstract_model),
    }
    description = f"batch {run.batch_size}, micro-batch {rows} × {length} tokens, {run.compute_dtype}"
    return MemoryEstimate(name, description, needs, _training_host(abstract, mesh, device))


def resolve_compute_dtype(run: TrainConfig, device: Device) -> TrainConfig:
    """Replace the compute dtype "auto" of a run by the default of a device."""
    return run if run.compute_dtype != "auto" else dataclasses.replace(run, compute_dtype=device.dtype)


def estimate_chat(
    model: VideoLlamaConfig,
    mesh: MeshConfig,
    device: Device,
    *,
    generation: GenerationConfig = GREEDY,
    lora: LoraConfig = NO_LORA,
    scheme: str | None = None,
    length: int = 0,
) -> MemoryEstimate:
    """Estimate the memory of a conversation.

    Args:
        model: The model's config.
        mesh: The device mesh.
        device: The type of the devices.
        generation: The options of decoding.
        lora: The config of LoRA, whose updates are merged after loading.
        scheme: The quantization, "int8" or "int4"; None for none.
        length: Tokens of the prompt; 0 for the context length without the new tokens.

    Raises:
        ConfigError: The prompt and the new tokens are longer than the model's context.
    """
    from vllama_jax.generate.engine import CHUNK_LENGTHS, shape_for
    from vllama_jax.generate.prompt import check_context_length

    dtype, new, beams = device.dtype, generation.max_new_tokens, generation.num_beams
    prompt = length or max(model.llama.max_length - new, 1)
    check_context_length(prompt, new, model.llama)
    shape_of_row = shape_for(prompt, new)
    chunk, capacity = min(shape_of_row.prompt, CHUNK_LENGTHS[-1]), shape_of_row.capacity
    weights = _abstract_weights(model, mesh, dtype, scheme, lora)
    shape = StepShape(rows=1, length=chunk, itemsize=_itemsize(dtype), mesh=mesh)
    cache = estimate_kv_cache(model.llama, dataclasses.replace(shape, rows=beams), capacity)
    frame_branches = [branch for branch in get_branches(model) if branch.prompt_array == "frames"]
    temporary = max(
        *(estimate_encoder(model, branch.name, shape) for branch in frame_branches),
        estimate_prefill_layer(model.llama, shape, capacity),
        cache if beams > 1 else 0,  # a copy with the beams reordered
        max(map(_device_bytes, weights.values())) - cache,  # layers are unstacked before the cache is allocated
    )
    needs = {**_bytes_by_component(weights), "KV cache": cache, "activations": temporary}
    description = f"prompt of {prompt} tokens, {new} new tokens, {dtype}" + (f", {scheme} weights" if scheme else "")
    return MemoryEstimate(
        "chat", description, needs, {"program": PROGRAM_BYTES, "loading weights": _loading_bytes(weights, device)}
    )


def _abstract_weights(
    model: VideoLlamaConfig, mesh: MeshConfig, dtype: str, scheme: str | None, lora: LoraConfig
) -> "dict[str, ShapeDtypeStruct]":
    """Return all weights by path, as abstract arrays with the shardings that `model.load` uses."""
    from flax import nnx

    from vllama_jax.checkpoints.quantize import abstract_layers
    from vllama_jax.sharding import shard_abstract

    network, _ = abstract_layers(model, dtype, scheme, lora)
    state = shard_abstract(nnx.state(network), _abstract_mesh(mesh), fsdp=False)
    return {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def suggest_flags(
    model: VideoLlamaConfig, need: MemoryEstimate, run: TrainConfig, mesh: MeshConfig, device: Device, length: int = 0
) -> str:
    """Find flags with which a run fits: more gradient accumulation steps, or more sharding of the parameters.

    Args:
        model: The model's config.
        need: The estimate of the run, which does not fit.
        run: The run config.
        mesh: The device mesh.
        device: The type of the devices.
        length: Tokens of a sequence; 0 for the maximum length of the run.

    Returns:
        The flags; "" if there are none.
    """

    def fits(grad_accum_steps: int, wider: MeshConfig) -> bool:
        changed = dataclasses.replace(run, grad_accum_steps=grad_accum_steps)
        return verdict(estimate_training(model, need.name, changed, wider, device, length), device) == "fits"

    for wider in _wider_meshes(mesh, device):
        rows = run.batch_size // (wider.data * wider.fsdp)
        choices = [
            count
            for count in range(run.grad_accum_steps, rows + 1)
            if not run.batch_size % (count * wider.data * wider.fsdp)
        ]
        if choices and fits(choices[-1], wider):
            steps = next(count for count in choices if fits(count, wider))
            flags = [f"--mesh.data {wider.data} --mesh.fsdp {wider.fsdp}"] * (wider != mesh)
            return " ".join([*flags, *[f"--grad-accum-steps {steps}"] * (steps != run.grad_accum_steps)])
    return ""


def _wider_meshes(mesh: MeshConfig, device: Device) -> Iterator[MeshConfig]:
    """Yield meshes with larger fsdp axes: first with devices of the data axis, then, except for "here", with more."""
    yield mesh
    while not mesh.data % 2:
        mesh = dataclasses.replace(mesh, data=mesh.data // 2, fsdp=mesh.fsdp * 2)
        yield mesh
    while device.name in DEVICES and mesh.fsdp < MAX_FSDP:
        mesh = dataclasses.replace(mesh, fsdp=mesh.fsdp * 2)
        yield mesh


def list_replicated_axes(model: VideoLlamaConfig, mesh: MeshConfig) -> list[str]:
    """List the dimensions of a model that are replicated because the mesh does not divide them, one message each."""
    from flax import nnx

    from vllama_jax.nn.network import abstract_network
    from vllama_jax.sharding import list_indivisible_axes

    return list_indivisible_axes(nnx.state(abstract_network(model)), _abstract_mesh(mesh))


def longest_example_length(model: VideoLlamaConfig, run: TrainConfig) -> int:
    """Return the maximum length in tokens that a batch of the run is padded to, from the configs of its datasets."""
    from vllama_jax.data.tokenization import padded_length
    from vllama_jax.memory.abstract_run import num_media_tokens

    longest = 0
    for text in (dataset.text for dataset in run.datasets):
        overhead = 1 + num_media_tokens(model, run) + INSTRUCTION_TOKENS * bool(text.instructions)
        longest = max(longest, text.max_length + (0 if text.layout == "conversation" else overhead))
    return padded_length(longest, run.data.length_buckets)


def _peak_phase(
    model: VideoLlamaConfig, run: TrainConfig, shape: StepShape, abstract_model: "AbstractModel"
) -> dict[str, int]:
    """Return the memory of the phase of a step that needs most: its gathered weights and its activations.

    The phases are the encoders, the trained Q-Former, a layer of the language model, and its head.
    """
    from vllama_jax.memory.abstract_run import num_media_tokens

    branch = find_branch(run.branch)
    encoder = branch.encoder(branch.media[0])
    scanned = run.data.feature_cache or encoder.is_scanned(model)
    tower = f"{encoder.tower}/blocks/" if scanned else encoder.tower
    llama, labels = model.llama, max(shape.length - num_media_tokens(model, run), 1)
    head = "llama/embedding" if llama.tie_embeddings else "llama/head/kernel"
    phases = [
        (0, estimate_trained_qformer(model, run.branch, shape)),
        (_gathered_bytes(abstract_model, "llama/blocks/", shape.mesh), estimate_training_layer(llama, shape)),
        (_gathered_bytes(abstract_model, head, shape.mesh), estimate_logits(llama, shape, labels)),
    ]
    if not run.data.feature_cache:
        phases.append((_gathered_bytes(abstract_model, tower, shape.mesh), estimate_encoder(model, run.branch, shape)))
    weights, activations = max(phases, key=sum)
    return {"gathered weights": weights, "activations": activations}


def _gathered_bytes(abstract_model: "AbstractModel", prefix: str, mesh: MeshConfig) -> int:
    """Return the size of gathered weights: one layer copied from stacked weights, and the next one with fsdp.

    A weight that is not in layers, or a tower whose layers are not stacked, is gathered at once.
    """
    import jax

    paths = [path for path in abstract_model.variables if is_within(path, prefix.removesuffix("/"))]
    leaves = [
        jax.ShapeDtypeStruct(
            abstract_model.variables[path].shape, abstract_model.variables[path].dtype, sharding=sharding
        )
        for path, sharding in abstract_model.shardings(paths, _abstract_mesh(mesh), fsdp=False).items()
    ]
    gathers = mesh.fsdp > 1
    return (
        _device_bytes(leaves) // leaves[0].shape[0] * (1 + gathers)
        if prefix.endswith("/")
        else _device_bytes(leaves) * gathers
    )


def _training_host(abstract: "AbstractRun", mesh: MeshConfig, device: Device) -> dict[str, int]:
    """Estimate the memory of a run on each host. Batches are those of the step, and prefetched ones."""
    data = abstract.config.data
    hosts = math.ceil(mesh.data * mesh.fsdp * mesh.tensor / device.per_host)
    batch = sum(leaf.size * leaf.dtype.itemsize for leaf in abstract.batch.values()) // hosts
    return {
        "program": PROGRAM_BYTES * (1 + data.num_workers),
        "loading weights": _loading_bytes({**abstract.frozen, **abstract.state.weights}, device),
        "prefetched batches": (1 + data.prefetch * max(data.num_workers, 1)) * batch,
        "media decoding": 0 if data.feature_cache else max(data.num_threads, data.num_workers) * DECODER_BYTES,
    }


def _loading_bytes(weights: "Mapping[str, Array | ShapeDtypeStruct]", device: Device) -> int:
    """Estimate the memory of weights in transit through a host: its devices' shards; on a CPU, a copy of one weight."""
    if device.is_host:
        return max(map(_device_bytes, weights.values()))
    sizes = (min(_device_bytes(leaf) * device.per_host, leaf.size * leaf.dtype.itemsize) for leaf in weights.values())
    return min(sum(sizes), max_concurrent_gb(leaf.shape for leaf in weights.values()) * 10**9)


def _abstract_mesh(mesh: MeshConfig) -> "AbstractMesh":
    """Create a mesh without devices."""
    import jax

    return jax.sharding.AbstractMesh((mesh.data, mesh.fsdp, mesh.tensor), ("data", "fsdp", "tensor"))


def _bytes_by_component(weights: "Mapping[str, ShapeDtypeStruct]") -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path, leaf in weights.items():
        sizes[get_component(path)] = sizes.get(get_component(path), 0) + _device_bytes(leaf)
    return sizes


def _device_bytes(tree: Any) -> int:
    """Return the size of abstract arrays with shardings on one device."""
    import jax

    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _itemsize(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2}[dtype]
