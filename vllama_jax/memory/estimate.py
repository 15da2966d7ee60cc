"""What a chat or a training step needs, before anything is loaded: on each device and on each host, by part, in bytes.

Weights, moments and batches follow from shapes, dtypes and shardings, and are exact. What lives while a program runs is
arithmetic (activations.py), and so is what a host takes. Importing this file imports no jax.
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
    encoder,
    estimate_kv_cache,
    estimate_prefill_layer,
    estimate_saved_activations,
    estimate_trained_qformer,
    estimate_training_layer,
    logits,
)
from vllama_jax.train.config import MeshConfig, TrainConfig, resolve_mesh, rows_per_shard

if TYPE_CHECKING:
    from jax import Array, ShapeDtypeStruct
    from jax.sharding import AbstractMesh

    from vllama_jax.memory.abstract_run import AbstractRun
    from vllama_jax.train.state import AbstractModel

GIGA = 10**9
MARGIN = 0.1  # of what a device has for us: left free, as what is computed by hand is not exact
GPU_SHARE = 0.75  # of a GPU's memory, which JAX takes unless XLA_CLIENT_MEM_FRACTION says otherwise
PROGRAM_BYTES = 2 * GIGA  # of Python with its libraries, and of compiling: 1.2 GB in a tiny run, 1.8 for 13B on TPUs
DECODER_BYTES = 64 * 10**6  # allowed for a thread that decodes: twenty frames of 1080p as a codec keeps them
MOST_FSDP = 64  # that advice looks at
INSTRUCTION_TOKENS = 64  # around a caption: an instruction, the media's tags and the template's words, at most


@dataclasses.dataclass(frozen=True)
class Device:
    """bytes: of memory, by the maker's data sheet. usable: the share of it that JAX takes. per_host: devices of a host.

    is_host: a CPU, whose memory is the host's.
    """

    name: str
    bytes: int
    usable_fraction: float
    per_host: int
    is_host: bool = False

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """In which weights are held and multiplied unless told otherwise."""
        return "float32" if self.is_host else "bfloat16"


# Per chip, from the makers' data sheets, in their GB. GPUs of a server by eight; TPU hosts of four chips, as in slices.
DEVICES = {
    device.name: device
    for device in (
        *(Device(name, gigabytes * GIGA, GPU_SHARE, 8) for name, gigabytes in [("H200", 141), ("H100", 80)]),
        *(Device(name, gigabytes * GIGA, GPU_SHARE, 8) for name, gigabytes in [("A100-80", 80), ("A100-40", 40)]),
        *(Device(name, 24 * GIGA, GPU_SHARE, 8) for name in ("L4", "RTX-4090", "RTX-3090")),
        *(
            Device(name, gigabytes * GIGA, 1.0, 4)
            for name, gigabytes in [("v4", 32), ("v5e", 16), ("v5p", 95), ("v6e", 32)]
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """What one use of a model takes.

    name: "chat", or the run config's. told: of what size it is. device, host: bytes on each, by part.
    """

    name: str
    description: str
    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_total(self) -> int:
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def usable_bytes(need: MemoryEstimate, device: Device) -> int:
    """What each device has for this need; a CPU's memory is shared with the host's part of it."""
    shared = need.host_total // device.per_host if device.is_host else 0
    return int(device.bytes * device.usable_fraction) - shared


def verdict(need: MemoryEstimate, device: Device) -> Literal["fits", "tight", "does not fit"]:
    """tight: within a tenth of all that there is, so that it may fail."""
    room = usable_bytes(need, device)
    if need.device_total > room:
        return "does not fit"
    return "fits" if need.device_total <= (1 - MARGIN) * room else "tight"


def find_device(name: str) -> Device:
    """A device of the table by its name, in any spelling, or "here". Raises ConfigError for an unknown one."""
    if name == "here":
        return _detect_device()
    plain = {_plain(known): device for known, device in DEVICES.items()}
    if _plain(name) not in plain:
        raise ConfigError(f"no device {name!r}: choose one of {', '.join(DEVICES)}, or here")
    return plain[_plain(name)]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum()).removesuffix("gb")


def _detect_device() -> Device:
    """What JAX finds on this machine."""
    import jax

    device, count = jax.devices()[0], jax.local_device_count()
    if device.platform == "cpu":
        return Device("cpu", _host_memory() // count, 1.0, count, is_host=True)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise ConfigError(
            f"{device.device_kind} does not report its memory; name the mesh with --mesh.fsdp, or, to estimate memory, "
            "the device with --devices"
        )
    return Device(device.device_kind, limit, 1.0, count)


def _host_memory() -> int:
    """Of this machine, or of the container that this process is in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(file).read_text().strip() if Path(file).exists() else "max"
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def resolve_device_mesh(mesh: MeshConfig, device: Device) -> MeshConfig:
    """The mesh with data's places counted: over the devices that are here, or over as few as it names.

    Raises ConfigError for a mesh of another number of devices than are here.
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
    """What a run needs, of live videos unless it reads features. length: tokens of a sample; 0 for the longest.

    Raises ConfigError for patterns that match nothing, and for a batch that the mesh does not divide.
    """
    from vllama_jax.memory.abstract_run import abstract_run

    rows, length = rows_per_shard(run, mesh), length or longest_example_length(model, run)
    run = resolve_compute_dtype(run, device)
    abstract = abstract_run(model, run, _abstract_mesh(mesh), length)
    shape = StepShape(rows=rows, length=length, itemsize=_itemsize(run.compute_dtype), mesh=mesh)
    learning = _device_bytes(abstract.state.weights)
    needs = {
        **_bytes_by_component(abstract.frozen),
        "what learns": learning,
        "Adam's moments": _device_bytes(abstract.state.opt_state),
        "gradients": (1 + (run.grad_accum_steps > 1)) * learning + learning * shape.itemsize // 4,
        "batch": _device_bytes(abstract.batch),
        "layers' inputs": estimate_saved_activations(model.llama, shape, run.remat_policy),
        **_peak_phase(model, run, shape, abstract.abstract_model),
    }
    description = f"batch {run.batch_size}, {rows} × {length} tokens at a time, {run.compute_dtype}"
    return MemoryEstimate(name, description, needs, _training_host(abstract, mesh, device))


def resolve_compute_dtype(run: TrainConfig, device: Device) -> TrainConfig:
    """The run with the compute dtype that "auto" means on a device."""
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
    """What a conversation needs whose prompt has `length` tokens; 0: as many as the model reads beside its answer.

    scheme: how the weights are quantised (checkpoints/quantize.py); None where they are not.
    Raises ConfigError when they do not fit the model's context.
    """
    from vllama_jax.generate import check_context_length, padded_prompt_length

    dtype, new, beams = device.dtype, generation.max_new_tokens, generation.num_beams
    prompt = length or max(model.llama.max_length - new, 1)
    check_context_length(prompt, new, model.llama)
    padded = padded_prompt_length(prompt)
    capacity = padded_prompt_length(padded + -(-new // 64) * 64)
    weights = _loaded(model, mesh, dtype, scheme, lora)
    one = StepShape(rows=1, length=padded, itemsize=_itemsize(dtype), mesh=mesh)
    cache = estimate_kv_cache(model.llama, dataclasses.replace(one, rows=beams), capacity)
    at_work = max(
        *(encoder(model, branch.name, one) for branch in get_branches(model) if branch.prompt_array == "frames"),
        estimate_prefill_layer(model.llama, one, capacity),
        cache if beams > 1 else 0,  # beams change places
        max(map(_device_bytes, weights.values())) - cache,  # layers become arrays of their own, before there is a cache
    )
    needs = {**_bytes_by_component(weights), "key-value cache": cache, "activations": at_work}
    description = f"prompt of {prompt} tokens, {new} new ones, {dtype}" + (f" with {scheme} weights" if scheme else "")
    return MemoryEstimate(
        "chat",
        description,
        needs,
        {"program": PROGRAM_BYTES, "weights while they load": _loading_bytes(weights, device)},
    )


def _loaded(
    model: VideoLlamaConfig, mesh: MeshConfig, dtype: str, scheme: str | None, lora: LoraConfig
) -> "dict[str, ShapeDtypeStruct]":
    """All weights by path, as `model.load` lays them over a mesh."""
    from flax import nnx

    from vllama_jax.checkpoints.quantize import abstract_layers
    from vllama_jax.sharding import shard_abstract

    network, _ = abstract_layers(model, dtype, scheme, lora)
    state = shard_abstract(nnx.state(network), _abstract_mesh(mesh), fsdp=False)
    return {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def suggest_flags(
    model: VideoLlamaConfig, need: MemoryEstimate, run: TrainConfig, mesh: MeshConfig, device: Device, length: int = 0
) -> str:
    """The flags of the first arrangement of a run that fits: in parts, or split over more devices; "" for none."""

    def fits(grad_accum_steps: int, wider: MeshConfig) -> bool:
        parts = dataclasses.replace(run, grad_accum_steps=grad_accum_steps)
        return verdict(estimate_training(model, need.name, parts, wider, device, length), device) == "fits"

    for wider in _wider_meshes(mesh, device):
        rows = run.batch_size // (wider.data * wider.fsdp)
        choices = [
            count
            for count in range(run.grad_accum_steps, rows + 1)
            if not run.batch_size % (count * wider.data * wider.fsdp)
        ]
        if choices and fits(choices[-1], wider):
            steps = next(count for count in choices if fits(count, wider))
            split = [f"--mesh.data {wider.data} --mesh.fsdp {wider.fsdp}"] * (wider != mesh)
            return " ".join([*split, *[f"--grad-accum-steps {steps}"] * (steps != run.grad_accum_steps)])
    return ""


def _wider_meshes(mesh: MeshConfig, device: Device) -> Iterator[MeshConfig]:
    """Meshes that split weights more: over devices that data has; then, where devices are only named, over more."""
    yield mesh
    while not mesh.data % 2:
        mesh = dataclasses.replace(mesh, data=mesh.data // 2, fsdp=mesh.fsdp * 2)
        yield mesh
    while device.name in DEVICES and mesh.fsdp < MOST_FSDP:
        mesh = dataclasses.replace(mesh, fsdp=mesh.fsdp * 2)
        yield mesh


def list_replicated_axes(model: VideoLlamaConfig, mesh: MeshConfig) -> list[str]:
    """A line for each dimension that the mesh does not divide, and that is therefore whole on each device."""
    from flax import nnx

    from vllama_jax.nn.network import abstract_network
    from vllama_jax.sharding import list_indivisible_axes

    return list_indivisible_axes(nnx.state(abstract_network(model)), _abstract_mesh(mesh))


def longest_example_length(model: VideoLlamaConfig, run: TrainConfig) -> int:
    """Tokens that a batch of the run is padded to at most, by its datasets' configs."""
    from vllama_jax.data.tokenization import padded_length
    from vllama_jax.memory.abstract_run import num_media_tokens

    longest = 0
    for text in (dataset.text for dataset in run.datasets):
        around = 1 + num_media_tokens(model, run) + INSTRUCTION_TOKENS * bool(text.instructions)
        longest = max(longest, text.max_length + (0 if text.layout == "conversation" else around))
    return padded_length(longest, run.data.length_buckets)


def _peak_phase(
    model: VideoLlamaConfig, run: TrainConfig, shape: StepShape, abstract_model: "AbstractModel"
) -> dict[str, int]:
    """Of what a step does one after the other, that which takes most: the weights it has at hand, and its activations.

    The encoders, the Q-Former that learns, the language model's layers, its head.
    """
    from vllama_jax.memory.abstract_run import num_media_tokens

    branch = find_branch(run.branch)
    frozen = branch.encoder(branch.media[0])
    scanned = run.data.feature_cache or frozen.is_scanned(model)
    tower = f"{frozen.tower}/blocks/" if scanned else frozen.tower
    llama, labels = model.llama, max(shape.length - num_media_tokens(model, run), 1)
    head = "llama/embedding" if llama.tie_embeddings else "llama/head/kernel"
    phases = [
        (0, estimate_trained_qformer(model, run.branch, shape)),
        (_gathered_bytes(abstract_model, "llama/blocks/", shape.mesh), estimate_training_layer(llama, shape)),
        (_gathered_bytes(abstract_model, head, shape.mesh), logits(llama, shape, labels)),
    ]
    if not run.data.feature_cache:
        phases.append((_gathered_bytes(abstract_model, tower, shape.mesh), encoder(model, run.branch, shape)))
    weights, activations = max(phases, key=sum)
    return {"weights at hand": weights, "activations": activations}


def _gathered_bytes(abstract_model: "AbstractModel", prefix: str, mesh: MeshConfig) -> int:
    """A layer of these stacked weights, whole over fsdp: one is copied out of the stack, and the next one gathered.

    A weight outside of layers, or a tower whose layers are not stacked, is gathered whole.
    """
    import jax

    paths = [path for path in abstract_model.variables if is_within(path, prefix.removesuffix("/"))]
    leaves = [
        jax.ShapeDtypeStruct(abstract_model.variables[path].shape, abstract_model.variables[path].dtype, sharding=place)
        for path, place in abstract_model.shardings(paths, _abstract_mesh(mesh), fsdp=False).items()
    ]
    gathers = mesh.fsdp > 1
    return (
        _device_bytes(leaves) // leaves[0].shape[0] * (1 + gathers)
        if prefix.endswith("/")
        else _device_bytes(leaves) * gathers
    )


def _training_host(abstract: "AbstractRun", mesh: MeshConfig, device: Device) -> dict[str, int]:
    """Batches are read ahead: those that are ready or under way, and the one that the step has."""
    data = abstract.config.data
    hosts = math.ceil(mesh.data * mesh.fsdp * mesh.tensor / device.per_host)
    batch = sum(leaf.size * leaf.dtype.itemsize for leaf in abstract.batch.values()) // hosts
    return {
        "program": PROGRAM_BYTES * (1 + data.num_workers),
        "weights while they load": _loading_bytes({**abstract.frozen, **abstract.state.weights}, device),
        "batches ahead": (1 + data.prefetch * max(data.num_workers, 1)) * batch,
        "decoding": 0 if data.feature_cache else max(data.num_threads, data.num_workers) * DECODER_BYTES,
    }


def _loading_bytes(weights: "Mapping[str, Array | ShapeDtypeStruct]", device: Device) -> int:
    """Weights on their way through a host: its devices' parts, each read once; on a CPU, one weight beside itself."""
    if device.is_host:
        return max(map(_device_bytes, weights.values()))
    parts = (min(_device_bytes(leaf) * device.per_host, leaf.size * leaf.dtype.itemsize) for leaf in weights.values())
    return min(sum(parts), max_concurrent_gb(leaf.shape for leaf in weights.values()) * 10**9)


def _abstract_mesh(mesh: MeshConfig) -> "AbstractMesh":
    """A mesh of no devices in particular."""
    import jax

    return jax.sharding.AbstractMesh((mesh.data, mesh.fsdp, mesh.tensor), ("data", "fsdp", "tensor"))


def _bytes_by_component(weights: "Mapping[str, ShapeDtypeStruct]") -> dict[str, int]:
    parts: dict[str, int] = {}
    for path, leaf in weights.items():
        parts[get_component(path)] = parts.get(get_component(path), 0) + _device_bytes(leaf)
    return parts


def _device_bytes(tree: Any) -> int:
    """Of abstract arrays with shardings, on one device."""
    import jax

    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _itemsize(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2}[dtype]
