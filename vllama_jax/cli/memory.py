"""vllama memory."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from vllama_jax.branches import find_branch
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.checkpoints.restore import only_answers
from vllama_jax.checkpoints.shipped import MODEL_NAME
from vllama_jax.cli._devices import leave_accelerators
from vllama_jax.cli._run_config import first_argument
from vllama_jax.cli._usage import Command, Json, at_least
from vllama_jax.config import (
    NO_LORA,
    GenerationConfig,
    LoraConfig,
    VideoLlamaConfig,
    tiny,
    video_llama_7b,
    video_llama_13b,
)
from vllama_jax.errors import ConfigError
from vllama_jax.memory import estimate
from vllama_jax.memory.estimate import Device, Need
from vllama_jax.model import without_missing_branch
from vllama_jax.train.config import MeshConfig, TrainConfig
from vllama_jax.train.config_files import load_config, shipped

SIZES: dict[str, Callable[[], VideoLlamaConfig]] = {"7b": video_llama_7b, "13b": video_llama_13b, "tiny": tiny}
DEFAULT_SIZE = "7b"  # whose flags --help shows when nothing is named
ALL_DEVICES = MeshConfig()
SHOWN = 5 * 10**6  # bytes; smaller parts are only counted


@dataclasses.dataclass(frozen=True)
class MemoryOptions:
    """What is asked of a model and of a run config alike.

    Attributes:
        devices: What it is to run on: here (the devices that JAX finds), or H200, H100, A100-80, A100-40, L4, RTX-4090,
            RTX-3090, v4, v5e, v5p, v6e, as many as the mesh has.
        length: Tokens of a sample or of a conversation; 0 for the longest there may be.
        require_fit: Fail unless all of it fits, with a tenth to spare.
        json_output: Print one JSON object.
    """

    devices: str = "here"
    length: int = 0
    require_fit: bool = False
    json_output: Json = False

    def __post_init__(self) -> None:
        at_least(0, length=self.length)


AS_IT_IS = MemoryOptions()


def with_config(arguments: list[str]) -> tuple[Command, str, list[str]]:
    """The command for the model or the run config that the first argument names."""
    advice = "name a size (7b, 13b), a model directory or a run config first: `vllama memory 7b`"
    named = first_argument(arguments, advice) or DEFAULT_SIZE
    command = _of_model() if _is_model(named) else _of_run(named)
    return command, "vllama memory", arguments


def _is_model(named: str) -> bool:
    return named in (*SIZES, MODEL_NAME) or Path(named).is_dir()


def _of_model() -> Command:
    def memory(
        model: tyro.conf.Positional[str],
        /,
        asked: Annotated[MemoryOptions, tyro.conf.arg(name="")] = AS_IT_IS,
        *,
        mesh: MeshConfig = ALL_DEVICES,
        branch: Literal["vision", "audio"] = "vision",
        batch_size: int = 0,
        grad_accum_steps: int = 1,
        max_new_tokens: int = 300,
        num_beams: int = 1,
        base: str = "",
    ) -> None:
        """Estimate what a chat and both stages of training need on each device and each host. Nothing is loaded.

        Example: vllama memory 13b --devices v5e --mesh.fsdp 16 --batch-size 64

        Of a quantized model a chat alone, as it cannot be trained. Of a run config it is what the run needs; each field
        of the config is an option then, as in `vllama train`.

        Args:
            model: A size that was published (7b, 13b), a model directory, a run's, or a run config.
            asked: On what.
            mesh: How devices are arranged. A chat is split over tensor only.
            branch: Which branch is trained.
            batch_size: Samples a step; 0 for what the shipped config of a stage has.
            grad_accum_steps: A step's batch is run in so many parts.
            max_new_tokens: The longest answer, in tokens.
            num_beams: Of a chat's beam search.
            base: A run's base model, where that has moved.
        """
        at_least(0, batch_size=batch_size)
        at_least(1, grad_accum_steps=grad_accum_steps)
        device, mesh = _find_devices(asked, mesh)
        trained, talking, lora, scheme = _find_model(model, base)
        generation = GenerationConfig(max_new_tokens=max_new_tokens, num_beams=num_beams)
        talk = {"generation": generation, "lora": lora, "scheme": scheme, "length": asked.length}
        uses = [_chat(talking, mesh, device, talk)]
        for stage in () if scheme else (f"{branch}_stage1", f"{branch}_stage2"):
            run, _ = load_config(stage)
            size = batch_size or run.batch_size
            run = dataclasses.replace(run, batch_size=size, grad_accum_steps=grad_accum_steps, lora=lora)
            uses.append(_stage(trained, stage, run, (mesh, device, asked.length)))
        _tell(model, uses, (mesh, device, estimate.notes(trained, mesh)), asked)

    return memory


def _of_run(named: str) -> Command:
    if named not in shipped() and not Path(named).is_file():
        known = ", ".join([*SIZES, *shipped()])
        raise ConfigError(
            f"{named}: no such model or run config; give a model directory, a Python file, or one of {known}"
        )
    default, _ = load_config(named)

    def memory(
        config: tyro.conf.Positional[str],
        /,
        run: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        asked: Annotated[MemoryOptions, tyro.conf.arg(name="")] = AS_IT_IS,
        *,
        base: str = "",
        exact: bool = False,
    ) -> None:
        """Estimate what a run needs on each device and on each host. Nothing is loaded. Each field is an option.

        Example: vllama memory vision_stage2 --model 7b --devices A100-40 --mesh.fsdp 8

        The model may be a directory, or a size that was published (7b, 13b).

        Args:
            config: The run config: a Python file, or one that is shipped.
            run: The config.
            asked: On what.
            base: Where the base model is now, if not where the config says.
            exact: Compile the step for the devices that are here, and tell what XLA says. It takes minutes.
        """
        if exact and asked.devices != "here":
            raise ConfigError("--exact compiles for the devices that are here; leave --devices out")
        device, mesh = _find_devices(asked, run.mesh)
        if not (base or _is_model(run.model)):
            raise ConfigError(f"{run.model}: no such model directory; name one with --model, or a size: --model 7b")
        model, _, _, scheme = _find_model(base or run.model, "")
        if scheme:
            raise only_answers(base or run.model, scheme)
        uses = [_stage(model, config, run, (mesh, device, asked.length))]
        if exact:
            uses = [dataclasses.replace(uses[0], compiled=_compiled(model, run, (mesh, device, asked.length)))]
        _tell(f"{config} of {run.model}", uses, (mesh, device, estimate.notes(model, mesh)), asked)

    return memory


@dataclasses.dataclass(frozen=True)
class Use:
    """A need, whether it fits, and what would make it fit if not: flags of `vllama train`, or how to load for a chat.

    compiled: what XLA says of it, if asked.
    """

    need: Need
    verdict: str
    advice: str = ""
    compiled: dict[str, int] = dataclasses.field(default_factory=dict)


Where = tuple[MeshConfig, Device, int]  # the last: --length


def _find_devices(asked: MemoryOptions, mesh: MeshConfig) -> tuple[Device, MeshConfig]:
    """Raises ConfigError for devices that are not known, and a mesh that is not theirs."""
    if asked.devices != "here":
        leave_accelerators()
    device = estimate.find_device(asked.devices)
    return device, estimate.find_mesh(mesh, device)


def _find_model(named: str, base: str) -> tuple[VideoLlamaConfig, VideoLlamaConfig, LoraConfig, str | None]:
    """Of a published size, or of what a directory holds.

    The model to train, the one to talk to, its low-rank updates, and how its weights are quantised.
    """
    if named in SIZES:
        return SIZES[named](), SIZES[named](), NO_LORA, None
    from vllama_jax.checkpoints.quantize import scheme_of

    directory = open_model(named, base or None)
    return directory.config, without_missing_branch(directory).config, directory.lora, scheme_of(directory, None)


def _chat(model: VideoLlamaConfig, mesh: MeshConfig, device: Device, options: dict[str, Any]) -> Use:
    need = estimate.chatting(model, mesh, device, **options)
    verdict, advice = estimate.verdict(need, device), ""
    for tensor in (2, 4, 8):
        wider = dataclasses.replace(mesh, tensor=tensor)
        if verdict == "fits" or advice or tensor <= mesh.tensor or device.name not in estimate.DEVICES:
            continue
        if estimate.verdict(estimate.chatting(model, wider, device, **options), device) == "fits":
            advice = f"{tensor} devices, in Python: vl.load(MODEL, mesh=vl.sharding.make_mesh(tensor={tensor}))"
    return Use(need, verdict, advice)


def _stage(model: VideoLlamaConfig, name: str, run: TrainConfig, where: Where) -> Use:
    mesh, device, length = where
    find_branch(run.branch).require(model)
    try:
        need = estimate.training(model, name, run, mesh, device, length)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    verdict = estimate.verdict(need, device)
    return Use(need, verdict, "" if verdict == "fits" else estimate.advice(model, need, run, mesh, device, length))


def _compiled(model: VideoLlamaConfig, run: TrainConfig, where: Where) -> dict[str, int]:
    from vllama_jax.memory.abstract_run import abstract_run, compiled_memory
    from vllama_jax.sharding import make_mesh

    mesh, device, length = where
    run = estimate.with_dtype(run, device)
    places = make_mesh(mesh.data, mesh.fsdp, mesh.tensor)
    found = compiled_memory(abstract_run(model, run, places, length or estimate.longest_sample(model, run)), places)
    return {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes}


def _tell(named: str, uses: list[Use], where: tuple[MeshConfig, Device, list[str]], asked: MemoryOptions) -> None:
    mesh, device, notes = where
    if asked.json_output:
        print(json.dumps(_report(named, uses, mesh, device) | {"notes": notes}))
    else:
        console = Console(soft_wrap=True, highlight=False)
        console.print(_heading(named, mesh, device), markup=False)
        console.print(_table(uses))
        for line in [*map(_sentence, uses), *notes]:
            console.print(line, markup=False)
    if asked.require_fit and (bad := [use for use in uses if use.verdict != "fits"]):
        raise ConfigError("; ".join(f"{use.need.name}: {use.verdict}" for use in bad))


def _heading(named: str, mesh: MeshConfig, device: Device) -> str:
    count = mesh.data * mesh.fsdp * mesh.tensor
    share = f", of which JAX takes {_gigabytes(int(device.bytes * device.usable))}" if device.usable < 1 else ""
    return (
        f"{named} on {count} × {device.name} (data {mesh.data}, fsdp {mesh.fsdp}, tensor {mesh.tensor}), "
        f"each with {_gigabytes(device.bytes)}{share}"
    )


def _table(uses: list[Use]) -> Table:
    """A column for each use; a row for each part that any of them has."""
    table = Table(box=None, pad_edge=False)
    table.add_column("GB on each device")
    for use in uses:
        table.add_column(use.need.name, justify="right")
    _rows(table, [use.need.device for use in uses])
    table.add_row("all", *(_number(use.need.device_total) for use in uses))
    table.add_row("", *(use.verdict for use in uses))
    table.add_section()
    table.add_row("GB on each host")
    _rows(table, [use.need.host for use in uses])
    table.add_row("all", *(_number(use.need.host_total) for use in uses))
    return table


def _rows(table: Table, columns: list[dict[str, int]]) -> None:
    for part in dict.fromkeys(part for column in columns for part in column):
        if any(column.get(part, 0) >= SHOWN for column in columns):
            table.add_row(part, *(_number(column[part]) if part in column else "" for column in columns))


def _sentence(use: Use) -> str:
    told = f"{use.need.name}: {use.need.told}; {use.verdict}"
    told += f" (it would with {use.advice})" if use.advice else ""
    parts = ", ".join(f"{_gigabytes(size)} of {name}" for name, size in use.compiled.items())
    return told + (f"; compiled: {parts}" if parts else "")


def _report(named: str, uses: list[Use], mesh: MeshConfig, device: Device) -> dict[str, Any]:
    return {
        "model": named,
        "device": {"name": device.name, "bytes": device.bytes, "usable": int(device.bytes * device.usable)},
        "mesh": dataclasses.asdict(mesh),
        "uses": {
            use.need.name: {
                "told": use.need.told,
                "verdict": use.verdict,
                "advice": use.advice,
                "device": {**use.need.device, "all": use.need.device_total},
                "host": {**use.need.host, "all": use.need.host_total},
                **({"compiled": use.compiled} if use.compiled else {}),
            }
            for use in uses
        },
    }


def _number(count: int) -> str:
    return f"{count / 1e9:,.2f}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
