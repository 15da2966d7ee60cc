"""The command `vllama compile`."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro
from rich.console import Console

from vllama_jax.aot.compiler import Job, compile_all
from vllama_jax.aot.programs import Generation, TrainStep
from vllama_jax.aot.report import ProgramReport, print_reports
from vllama_jax.aot.topologies import Topology, parse_topology
from vllama_jax.cli._devices import use_cpu_only
from vllama_jax.cli._display import Display
from vllama_jax.cli._model_config import DEFAULT_SIZE, find_model_configs, find_trained_model, is_model, load_run_config
from vllama_jax.cli._run_config import require_first_argument
from vllama_jax.cli._usage import Command, JsonFlag, UsageError, require_at_least
from vllama_jax.config import GenerationConfig, VideoLlamaConfig
from vllama_jax.errors import ConfigError
from vllama_jax.memory import estimate
from vllama_jax.memory.mesh import choose_mesh
from vllama_jax.train.config import MeshConfig, TrainConfig, rows_per_shard
from vllama_jax.train.config_files import split_preset
from vllama_jax.train.presets import find_preset

OPEN_MESH = MeshConfig(tensor=0)
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOPOLOGY [TOPOLOGY ...]")]


def select_command(arguments: list[str]) -> tuple[Command, str, list[str]]:
    """Return the command for a model or a run config, by the first argument."""
    advice = "name a run config, a size (7b, 13b) or a model directory first: `vllama compile vision_stage1`"
    name_or_path = require_first_argument(arguments, advice) or DEFAULT_SIZE
    command = _make_model_command() if is_model(name_or_path) else _make_run_command(name_or_path)
    return command, "vllama compile", arguments


def _make_model_command() -> Command:
    def compile(  # the command's name
        model: tyro.conf.Positional[str],
        /,
        topology: Names,
        *,
        mesh: MeshConfig = OPEN_MESH,
        batch_size: int = 1,
        length: tuple[int, ...] = (512,),
        max_new_tokens: int = 300,
        num_beams: int = 1,
        quantize: Literal["none", "int8", "int4"] = "none",
        base: str = "",
        require_fit: bool = False,
        json_output: JsonFlag = False,
    ) -> None:
        """Compile a model's prefill and decode ahead of time for TPUs, and report memory, time and bottleneck.

        Example: vllama compile 7b --topology v5e:2x2 v5e:2x4 --batch-size 8

        No TPU is needed and nothing is loaded. Of a run config it is the train step; each field of the config is an
        option then, as in `vllama train`.

        Args:
            model: A size that was published (7b, 13b), a model directory, a run's, or a run config.
            topology: TPU slices, such as v5e:2x2, v5litepod-8 or v5p-8.
            mesh: How chips are arranged; tensor 0 takes as many as divide the key-value heads.
            batch_size: Prompts at a time.
            length: Tokens of a prompt.
            max_new_tokens: The longest answer, in tokens.
            num_beams: Of beam search.
            quantize: Of the weights.
            base: A run's base model, where that has moved.
            require_fit: Fail unless all programs fit.
            json_output: Print a JSON array of one object for each program.
        """
        require_at_least(1, batch_size=batch_size, length=min(length, default=0), max_new_tokens=max_new_tokens)
        use_cpu_only()
        _, config, _, stored = find_model_configs(model, base)
        scheme = stored if quantize == "none" else quantize
        generation = GenerationConfig(max_new_tokens=max_new_tokens, num_beams=num_beams)
        jobs = []
        for one in map(parse_topology, topology):
            arranged = _decoding_mesh(mesh, config, one.count)
            jobs += [
                (
                    one,
                    Generation(
                        name=name,
                        model=config,
                        mesh=arranged,
                        rows=batch_size,
                        length=tokens,
                        generation=generation,
                        scheme=scheme,
                    ),
                )
                for tokens in length
                for name in ("prefill", "decode")
            ]
        _report(jobs, require_fit=require_fit, as_json=json_output)

    return compile


def _decoding_mesh(mesh: MeshConfig, model: VideoLlamaConfig, count: int) -> MeshConfig:
    """Return the mesh of generation: the largest tensor axis that divides the KV heads, and data for the rest."""
    tensor = mesh.tensor or math.gcd(count, model.llama.num_kv_heads)
    return MeshConfig(data=mesh.data or max(count // tensor, 1), fsdp=1, tensor=tensor)


def _make_run_command(name_or_path: str) -> Command:
    default = load_run_config(name_or_path)
    preset = split_preset(name_or_path)[1]
    preset_topology = (find_preset(preset).topology,) if preset else ()

    def compile(  # the command's name
        config: tyro.conf.Positional[str],
        /,
        topology: Names = preset_topology,
        run: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        *,
        rows: int = 0,
        length: tuple[int, ...] = (),
        base: str = "",
        require_fit: bool = False,
        json_output: JsonFlag = False,
    ) -> None:
        """Compile a run's train step ahead of time, and report memory, time and bottleneck.

        Example: vllama compile vision_stage1 --model 7b --topology v5e:16x16 --rows 8

        No TPU is needed and nothing is loaded. For GPUs (H100:8) the figures are estimates. Each field of the run
        config is an option, as in `vllama train`.

        Args:
            config: The run config: a Python file, or one that is shipped.
            topology: TPU slices and GPUs, such as v5e:16x16, v5litepod-256, v5p-128, H100:8. By default, the preset's.
            run: The config. Its model may be a directory, or a size that was published (7b, 13b).
            rows: Rows of a chip at a time, in place of the config's batch size.
            length: Tokens of a sequence; all padded lengths that the run may have unless given.
            base: Where the base model is now, if not where the config says.
            require_fit: Fail unless all programs fit.
            json_output: Print a JSON array of one object for each program.
        """
        require_at_least(0, rows=rows)
        require_at_least(1, length=min(length, default=1))
        if not topology:
            raise UsageError(f"give a topology: `vllama compile {config} --topology v5e:16x16`")
        use_cpu_only()
        model = find_trained_model(run, base)
        longest = max(length, default=estimate.longest_example_length(model, run))
        lengths = length or (*(size for size in run.data.length_buckets if size < longest), longest)
        jobs = []
        for one in map(parse_topology, topology):
            arranged = _arrange(model, run, one, rows, longest)
            jobs += [(one, TrainStep(model=model, run=arranged, length=tokens)) for tokens in lengths]
        _report(jobs, require_fit=require_fit, as_json=json_output)

    return compile


def _arrange(model: VideoLlamaConfig, run: TrainConfig, topology: Topology, rows: int, longest: int) -> TrainConfig:
    """Return the run config with its mesh on a topology, its batch size and its compute dtype set."""
    device = estimate.DEVICES[topology.chip.name]
    run = estimate.resolve_compute_dtype(run, device)
    if rows:  # rows of a chip do not depend on how data and fsdp share the chips
        places = topology.count // max(run.mesh.tensor, 1)
        run = dataclasses.replace(run, batch_size=rows * places * run.grad_accum_steps)
    sides = topology.sides if topology.chip.platform == "tpu" else ()
    mesh, _ = choose_mesh(model, run, device, topology.count, length=longest, sides=sides)
    if mesh.data * mesh.fsdp * mesh.tensor != topology.count:
        raise ConfigError(
            f"mesh data={mesh.data} fsdp={mesh.fsdp} tensor={mesh.tensor} is for "
            f"{mesh.data * mesh.fsdp * mesh.tensor} chips, and {topology.name} has {topology.count}"
        )
    rows_per_shard(run, mesh)
    return dataclasses.replace(run, mesh=mesh)


def _report(jobs: Sequence[Job], *, require_fit: bool, as_json: bool) -> None:
    """Compile all programs and print their reports. If one fails, the reports before it are still printed."""
    reports: list[ProgramReport] = []
    try:
        with Display(quiet=as_json) as display:

            def show(number: int) -> None:
                topology, program = jobs[number]
                what = f"{program.name} of {program.length} tokens for {topology.name}"
                display.show_status(f"{number + 1}/{len(jobs)}: {what}; each takes up to minutes")

            for report in compile_all(jobs, show):
                reports.append(report)  # one after the other: an error must not lose those before it
    finally:
        _print_reports(reports, as_json=as_json)
    if require_fit and (bad := [report for report in reports if not report.fits]):
        names = ", ".join(f"{report.program} of {report.tokens} tokens on {report.topology}" for report in bad)
        raise ConfigError(f"does not fit: {names}")


def _print_reports(reports: list[ProgramReport], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([report.to_json() for report in reports]))
    else:
        print_reports(reports, Console(soft_wrap=True, highlight=False))
