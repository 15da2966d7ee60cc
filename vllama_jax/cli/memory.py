"""The command `vllama memory`."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from vllama_jax.branches import find_branch
from vllama_jax.cli._devices import use_cpu_only
from vllama_jax.cli._model_config import (
    DEFAULT_SIZE,
    find_model_configs,
    find_trained_model,
    is_model,
    load_run_config,
)
from vllama_jax.cli._run_config import require_first_argument
from vllama_jax.cli._usage import Command, JsonFlag, require_at_least
from vllama_jax.config import GenerationConfig, VideoLlamaConfig
from vllama_jax.errors import ConfigError
from vllama_jax.memory import estimate
from vllama_jax.memory.estimate import Device, MemoryEstimate
from vllama_jax.memory.mesh import choose_mesh
from vllama_jax.memory.torus import torus_sides
from vllama_jax.train.config import MeshConfig, TrainConfig
from vllama_jax.train.config_files import load_config

ALL_DEVICES = MeshConfig()
MIN_SHOWN_BYTES = 5 * 10**6  # smaller entries are not listed, but counted in the total


@dataclasses.dataclass(frozen=True)
class MemoryOptions:
    """Options of `vllama memory` for models and for run configs.

    Attributes:
        devices: The type of the devices, as many as the mesh has: H200, H100, A100-80, A100-40, L4, RTX-4090, RTX-3090,
            v4, v5e, v5p, v6e, or "here" for the local devices.
        length: The length of an example or a conversation, in tokens; 0 for the maximum.
        require_fit: Fail unless everything fits with a tenth of the memory to spare.
        json_output: Print one JSON object.
    """

    devices: str = "here"
    length: int = 0
    require_fit: bool = False
    json_output: JsonFlag = False

    def __post_init__(self) -> None:
        require_at_least(0, length=self.length)


DEFAULT_OPTIONS = MemoryOptions()


def select_command(arguments: list[str]) -> tuple[Command, str, list[str]]:
    """Return the command for the model or the run config that comes first, the words that start it, and its arguments.

    Raises:
        UsageError: The first argument is an option, or there is none.
        ConfigError: It names neither a model nor a run config.
    """
    advice = "give a size (7b, 13b), a model directory or a run config first: `vllama memory 7b`"
    name_or_path = require_first_argument(arguments, advice) or DEFAULT_SIZE
    command = _make_model_command() if is_model(name_or_path) else _make_run_command(name_or_path)
    return command, "vllama memory", arguments


def _make_model_command() -> Command:
    def memory(
        model: tyro.conf.Positional[str],
        /,
        options: Annotated[MemoryOptions, tyro.conf.arg(name="")] = DEFAULT_OPTIONS,
        *,
        mesh: MeshConfig = ALL_DEVICES,
        branch: Literal["vision", "audio"] = "vision",
        batch_size: int = 0,
        grad_accum_steps: int = 1,
        max_new_tokens: int = 300,
        num_beams: int = 1,
        base: str = "",
    ) -> None:
        """Estimate the memory of a chat and of both training stages on each device and host, without loading weights.

        Example: vllama memory 13b --devices v5e --mesh.fsdp 16 --batch-size 64

        For a quantized model, only a chat is estimated, because it cannot be trained. For a run config (`vllama memory
        vision_stage1`), the run is estimated, and every field of the config is an option, as in `vllama train`.

        Args:
            model: A published size (7b, 13b), a model or run directory, or a run config.
            options: Devices, length and output.
            mesh: The device mesh. A chat uses only its tensor axis.
            branch: The branch to train.
            batch_size: Examples per step; 0 for the batch size of the stage's config.
            grad_accum_steps: The number of micro-batches that a batch is divided into.
            max_new_tokens: The maximum length of an answer, in tokens.
            num_beams: The number of beams of a chat's beam search.
            base: The base model of a run, if it has moved.
        """
        require_at_least(0, batch_size=batch_size)
        require_at_least(1, grad_accum_steps=grad_accum_steps)
        device, mesh = _find_devices(options, mesh)
        train_model, chat_model, lora, scheme = find_model_configs(model, base)
        generation = GenerationConfig(max_new_tokens=max_new_tokens, num_beams=num_beams)
        chat_options = {"generation": generation, "lora": lora, "scheme": scheme, "length": options.length}
        workloads = [_estimate_chat(chat_model, mesh, device, chat_options)]
        for stage in () if scheme else (f"{branch}_stage1", f"{branch}_stage2"):
            run, _ = load_config(stage)
            size = batch_size or run.batch_size
            run = dataclasses.replace(run, batch_size=size, grad_accum_steps=grad_accum_steps, lora=lora)
            workloads.append(_estimate_stage(train_model, stage, run, (mesh, device, options.length)))
        _print_report(model, workloads, (mesh, device, estimate.list_replicated_axes(train_model, mesh)), options)

    return memory


def _make_run_command(name_or_path: str) -> Command:
    default = load_run_config(name_or_path)

    def memory(
        config: tyro.conf.Positional[str],
        /,
        run: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        options: Annotated[MemoryOptions, tyro.conf.arg(name="")] = DEFAULT_OPTIONS,
        *,
        base: str = "",
        exact: bool = False,
    ) -> None:
        """Estimate the memory of a run on each device and host, without loading weights.

        Every field of the run config is an option. The model may be a directory or a published size (7b, 13b).

        Example: vllama memory vision_stage2 --model 7b --devices A100-40 --mesh.fsdp 8

        Args:
            config: A Python file, or a config of the package.
            run: The run config.
            options: Devices, length and output.
            base: The base model, if it is not where the config says.
            exact: Also compile the training step for the local devices, and report XLA's figures. This takes minutes.
        """
        if exact and options.devices != "here":
            raise ConfigError("--exact compiles for the local devices; leave out --devices")
        model = find_trained_model(run, base)
        device, mesh = _find_run_mesh(options, model, run)
        workloads = [_estimate_stage(model, config, run, (mesh, device, options.length))]
        if exact:
            compiled = _compile_step(model, run, (mesh, device, options.length))
            workloads = [dataclasses.replace(workloads[0], compiled=compiled)]
        notes = estimate.list_replicated_axes(model, mesh)
        _print_report(f"{config} of {run.model}", workloads, (mesh, device, notes), options)

    return memory


@dataclasses.dataclass(frozen=True)
class Workload:
    """A chat or a training stage, and whether it fits.

    Attributes:
        need: The estimated memory.
        verdict: "fits", "tight" or "does not fit".
        advice: What would make it fit: options of `vllama train`, or how to load the model for a chat; "" if nothing.
        compiled: XLA's figures by name, in bytes, if the step was compiled.
    """

    need: MemoryEstimate
    verdict: str
    advice: str = ""
    compiled: dict[str, int] = dataclasses.field(default_factory=dict)


Target = tuple[MeshConfig, Device, int]  # mesh, device, --length


def _find_devices(options: MemoryOptions, mesh: MeshConfig) -> tuple[Device, MeshConfig]:
    """Return the device type and the mesh with all its sizes.

    Raises:
        ConfigError: The device type is unknown, or the mesh does not fit the devices.
    """
    if options.devices != "here":
        use_cpu_only()
    device = estimate.find_device(options.devices)
    return device, estimate.resolve_device_mesh(mesh, device)


def _find_run_mesh(options: MemoryOptions, model: VideoLlamaConfig, run: TrainConfig) -> tuple[Device, MeshConfig]:
    """Return the device type of a run, and its mesh: as `vllama train` would choose it here, or for `--devices`."""
    if run.mesh.fsdp or options.devices != "here":
        return _find_devices(options, dataclasses.replace(run.mesh, fsdp=run.mesh.fsdp or 1))
    import jax

    device = estimate.find_device("here")
    return device, choose_mesh(
        model, run, device, jax.device_count(), length=options.length, sides=torus_sides(jax.devices())
    )[0]


def _estimate_chat(model: VideoLlamaConfig, mesh: MeshConfig, device: Device, options: dict[str, Any]) -> Workload:
    need = estimate.estimate_chat(model, mesh, device, **options)
    verdict, advice = estimate.verdict(need, device), ""
    for tensor in (2, 4, 8):
        wider = dataclasses.replace(mesh, tensor=tensor)
        if verdict == "fits" or advice or tensor <= mesh.tensor or device.name not in estimate.DEVICES:
            continue
        if estimate.verdict(estimate.estimate_chat(model, wider, device, **options), device) == "fits":
            advice = f"{tensor} devices: vl.load(MODEL, mesh=vl.sharding.make_mesh(tensor={tensor})) in Python"
    return Workload(need, verdict, advice)


def _estimate_stage(model: VideoLlamaConfig, name: str, run: TrainConfig, target: Target) -> Workload:
    mesh, device, length = target
    find_branch(run.branch).require(model)
    try:
        need = estimate.estimate_training(model, name, run, mesh, device, length)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    verdict = estimate.verdict(need, device)
    return Workload(
        need, verdict, "" if verdict == "fits" else estimate.suggest_flags(model, need, run, mesh, device, length)
    )


def _compile_step(model: VideoLlamaConfig, run: TrainConfig, target: Target) -> dict[str, int]:
    from vllama_jax.memory.abstract_run import abstract_run, compiled_memory
    from vllama_jax.sharding import make_mesh

    mesh, device, length = target
    run = estimate.resolve_compute_dtype(run, device)
    device_mesh = make_mesh(mesh.data, mesh.fsdp, mesh.tensor)
    length = length or estimate.longest_example_length(model, run)
    memory = compiled_memory(abstract_run(model, run, device_mesh, length), device_mesh)
    return {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}


def _print_report(
    name_or_path: str, workloads: list[Workload], target: tuple[MeshConfig, Device, list[str]], options: MemoryOptions
) -> None:
    mesh, device, notes = target
    if options.json_output:
        print(json.dumps(_make_report(name_or_path, workloads, mesh, device) | {"notes": notes}))
    else:
        console = Console(soft_wrap=True, highlight=False)
        console.print(_format_heading(name_or_path, mesh, device), markup=False)
        console.print(_make_table(workloads))
        for line in [*itertools.chain(*map(_format_workload, workloads)), *notes]:
            console.print(line, markup=False)
    if options.require_fit and (failed := [workload for workload in workloads if workload.verdict != "fits"]):
        raise ConfigError("; ".join(f"{workload.need.name}: {workload.verdict}" for workload in failed))


def _format_heading(name_or_path: str, mesh: MeshConfig, device: Device) -> str:
    count = mesh.data * mesh.fsdp * mesh.tensor
    usable = _format_gb_with_unit(int(device.bytes * device.usable_fraction))
    share = f", {usable} usable by JAX" if device.usable_fraction < 1 else ""
    return (
        f"{name_or_path} on {count} × {device.name} (data {mesh.data}, fsdp {mesh.fsdp}, tensor {mesh.tensor}): "
        f"{_format_gb_with_unit(device.bytes)} each{share}"
    )


def _make_table(workloads: list[Workload]) -> Table:
    """Return a table with a column for each workload and a row for each entry of their estimates."""
    table = Table(box=None, pad_edge=False)
    table.add_column("GB on each device")
    for workload in workloads:
        table.add_column(workload.need.name, justify="right")
    _add_rows(table, [workload.need.device for workload in workloads])
    table.add_row("total", *(_format_gb(workload.need.device_total) for workload in workloads))
    table.add_row("verdict", *(workload.verdict for workload in workloads))
    table.add_section()
    table.add_row("GB on each host")
    _add_rows(table, [workload.need.host for workload in workloads])
    table.add_row("total", *(_format_gb(workload.need.host_total) for workload in workloads))
    return table


def _add_rows(table: Table, columns: list[dict[str, int]]) -> None:
    for entry in dict.fromkeys(entry for column in columns for entry in column):
        if any(column.get(entry, 0) >= MIN_SHOWN_BYTES for column in columns):
            table.add_row(entry, *(_format_gb(column[entry]) if entry in column else "" for column in columns))


def _format_workload(workload: Workload) -> Iterator[str]:
    yield f"{workload.need.name}: {workload.need.description}; {workload.verdict}"
    if workload.advice:
        yield f"  fits with {workload.advice}"
    if workload.compiled:
        sizes = (f"{_format_gb_with_unit(size)} of {name}" for name, size in workload.compiled.items())
        yield f"  compiled: {', '.join(sizes)}"


def _make_report(name_or_path: str, workloads: list[Workload], mesh: MeshConfig, device: Device) -> dict[str, Any]:
    return {
        "model": name_or_path,
        "device": {"name": device.name, "bytes": device.bytes, "usable": int(device.bytes * device.usable_fraction)},
        "mesh": dataclasses.asdict(mesh),
        "workloads": {
            workload.need.name: {
                "description": workload.need.description,
                "verdict": workload.verdict,
                "advice": workload.advice,
                "device": {**workload.need.device, "all": workload.need.device_total},
                "host": {**workload.need.host, "all": workload.need.host_total},
                **({"compiled": workload.compiled} if workload.compiled else {}),
            }
            for workload in workloads
        },
    }


def _format_gb(count: int) -> str:
    return f"{count / 1e9:,.2f}"


def _format_gb_with_unit(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
