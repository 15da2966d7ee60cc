"""vllama verify."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich import filesize
from rich.console import Console
from rich.table import Table

from vllama_jax.checkpoints.digests import list_checkpoint_steps
from vllama_jax.checkpoints.directory import ModelDirectory, RunDirectory, find_runs, open_model
from vllama_jax.checkpoints.quantize import resolve_scheme
from vllama_jax.cli._devices import use_cpu_only
from vllama_jax.cli._progress import bytes_bar, count_bar
from vllama_jax.cli._usage import JsonFlag, require_at_least
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.io.json_files import read_object

if TYPE_CHECKING:
    from vllama_jax.convert import ConversionPlan
    from vllama_jax.convert.verify.weights import CheckedCheckpoint


@dataclasses.dataclass(frozen=True)
class SourceFiles:
    """The files that the model was made from, as `vllama convert` takes them.

    Attributes:
        llama: The LLaMA directory.
        delta: A language model released as a difference to it.
        eva_vit: EVA-CLIP ViT-g.
        blip2: BLIP-2's Q-Former.
        imagebind: ImageBind.
        minigpt4: MiniGPT-4's projection.
        vl: The checkpoint of the vision-language branch.
        al: The checkpoint of the audio-language branch.
    """

    llama: Path | None = None
    delta: Path | None = None
    eva_vit: Path | None = None
    blip2: Path | None = None
    imagebind: Path | None = None
    minigpt4: Path | None = None
    vl: Path | None = None
    al: Path | None = None


NO_SOURCE_FILES = SourceFiles()


def verify(
    model: tyro.conf.Positional[Path],
    /,
    *,
    against: tuple[Path, ...] = (),
    source_files: Annotated[SourceFiles, tyro.conf.arg(name="")] = NO_SOURCE_FILES,
    config: Path | None = None,
    weights_only: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    tokens: int = 1024,
    seed: int = 0,
    quantize: Literal["int8", "int4"] | None = None,
    base: Path | None = None,
    json_output: JsonFlag = False,
) -> None:
    """Check that a model's files are as they were written, or that it computes what its PyTorch source does.

    Example: vllama verify MODEL --against DIRECTORY_OF_THE_PYTORCH_FILES

    With a source, each part runs here and in torch on the same random input, and each layer's output is compared.
    Of a run, all checkpoints are compared with the digests that were recorded when they were saved, and the base
    model's files with its manifest. Exits with 1 when anything is not as it should be. Of quantized weights it reports
    what they cost.

    Args:
        model: The model directory, or a run's.
        against: The PyTorch files, or directories of them; each is identified by its tensors.
        pieces: Each file by its kind; these win over --against.
        config: The JSON file that `vllama convert --config` was given.
        weights_only: Compare the weights bit by bit, and compute nothing.
        dtype: In which the model computes here; torch always computes in float32.
        tokens: The length of the prompt, or the longest that the model reads.
        seed: Of the random inputs.
        quantize: Measure what 8 or 4 bits would cost; not needed for a model that `vllama quantize` made.
        base: A run's base model, where that has moved.
        json_output: Print one JSON object.
    """
    require_at_least(1, tokens=tokens)
    require_at_least(0, seed=seed)
    given = {kind: path for kind, path in vars(source_files).items() if path is not None}
    if not against and not given:
        if weights_only or quantize:
            option = "--weights-only" if weights_only else "--quantize"
            raise ConfigError(f"{option} compares with the PyTorch files: name them with --against")
        use_cpu_only()  # what a run trained comes through JAX
        _verify_files(model, base, json_output)
        return
    directory = open_model(model, base)
    if weights_only and (scheme := resolve_scheme(directory, quantize)):
        raise ConfigError(f"{model}: {scheme} is not what the PyTorch files hold; leave out --weights-only")
    if weights_only:
        use_cpu_only()
    plan = _plan_conversion(directory, against, given, read_object(config, ConfigError) if config else None)
    if weights_only:
        _verify_weights(model, directory, plan, json_output)
    else:
        from vllama_jax.convert.verify.layers import check_installed

        check_installed()
        _verify_networks(model, directory, plan, (dtype, tokens, seed, quantize), json_output)


def _verify_files(model: Path, base: Path | None, json_output: bool) -> None:
    """A model directory's files, and of a run all its checkpoints and its base model's files."""
    from vllama_jax.convert.verify.weights import check_checkpoints, find_corrupt_weights, summarize

    runs, base_model = find_runs(model, base)
    with bytes_bar(sum(map(_checkpoint_bytes, runs))) as progress:
        checkpoints = check_checkpoints(runs, progress)
    corrupt = {str(checkpoint.path): checkpoint.damage for checkpoint in checkpoints if checkpoint.damage}
    directory = open_model(base_model) if corrupt else open_model(model, base)
    leaves = directory.manifest["leaves"]
    size = sum(_weight_bytes(leaf) for leaf in leaves.values())
    with bytes_bar(size) as progress:
        corrupt |= (corrupt_weights := find_corrupt_weights(directory, progress))
    if json_output:
        report = {"weights": len(leaves), "bytes": size, "damaged": corrupt}
        report |= {"checkpoints": [vars(one) | {"path": str(one.path)} for one in checkpoints]} if runs else {}
        print(json.dumps(report))
    else:
        for checkpoint in checkpoints:
            print(f"{checkpoint.path}: {_describe_checkpoint(checkpoint)}")
    if corrupt:
        told = summarize([f"{path} ({why})" for path, why in corrupt.items()])
        resumed = "restore it from a copy; a resumed run goes back to its last intact checkpoint"
        advice = "copy or convert it again" if corrupt_weights else resumed
        raise CheckpointError(f"{model}: not as it was written: {told}; {advice}")
    if not json_output:
        print(f"{directory.path}: {len(leaves)} weights, {filesize.decimal(size)}, all as they were written")


def _checkpoint_bytes(run: RunDirectory) -> int:
    """The size of the files in a run's checkpoints."""
    files = (file for step in list_checkpoint_steps(run.path) for file in (run.path / f"step_{step}").rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def _describe_checkpoint(checkpoint: "CheckedCheckpoint") -> str:
    if checkpoint.damage:
        return "damaged"
    if not checkpoint.digests:
        return "no digests recorded (an earlier version saved it); its weights can be read"
    return f"{checkpoint.files} files, {filesize.decimal(checkpoint.bytes)}, all as they were saved"


def _weight_bytes(leaf: Mapping[str, Any]) -> int:
    import numpy as np

    return math.prod(leaf["shape"]) * np.dtype(leaf["dtype"]).itemsize


def _plan_conversion(
    directory: ModelDirectory, against: tuple[Path, ...], given: Mapping[str, Path], config: Mapping[str, Any] | None
) -> "ConversionPlan":
    """The conversion that the source would be, as far as the model was made of it."""
    from vllama_jax.convert import plan
    from vllama_jax.convert.discover import find_weight_files
    from vllama_jax.convert.verify.weights import unpublished_head_counts

    made_of = directory.manifest["sources"]
    found = find_weight_files(against, given)
    paths = {kind: source.files[0] for kind, source in found.files.items()} | (
        {"llama": found.llama} if found.llama else {}
    )
    files = {kind: path for kind, path in paths.items() if kind in made_of} | dict(given)
    if "llama" not in files:
        raise ConfigError("no LLaMA directory among the PyTorch files; name it with --llama")
    llama, delta = files.pop("llama"), files.pop("delta", None)
    told = unpublished_head_counts(directory.config) if config is None else config
    return plan(llama_directory=llama, delta=delta, files=files, config=told)


def _verify_weights(model: Path, directory: ModelDirectory, plan: "ConversionPlan", json_output: bool) -> None:
    from vllama_jax.convert.verify.weights import compare_weights, config_differences, summarize

    with bytes_bar(sum(_weight_bytes(leaf) for leaf in directory.manifest["leaves"].values())) as progress:
        parts = compare_weights(directory, plan, progress)
    config = config_differences(directory, plan)
    different = [name for part in parts for name in part.different]
    if json_output:
        report = {"parts": [dataclasses.asdict(part) for part in parts], "config": config}
        print(json.dumps({**report, "equal": not different and not config}))
    else:
        table = _make_table("part", ("tensors", "bytes", "verdict"))
        for part in parts:
            verdict = f"{len(part.different)} different" if part.different else "equal"
            table.add_row(part.part, str(part.tensors), filesize.decimal(part.bytes), verdict)
        _print_table(table, directory, plan)
    if different or config:
        told = [*config, *([f"{len(different)} weights differ: {summarize(different)}"] if different else [])]
        raise CheckpointError(f"{model}: not what its source makes: {'; '.join(told)}")
    if not json_output:
        print(f"{model}: {sum(part.tensors for part in parts)} tensors, every bit equal to its source")


def _verify_networks(
    model: Path, directory: ModelDirectory, plan: "ConversionPlan", settings: tuple[Any, ...], json_output: bool
) -> None:
    from vllama_jax.convert.verify.layers import (
        BOUNDS,
        QUANTIZED_BOUNDS,
        VerifySettings,
        check_errors,
        compare_networks,
    )
    from vllama_jax.convert.verify.weights import config_differences, summarize
    from vllama_jax.runtime.compilation_cache import enable_compilation_cache

    enable_compilation_cache()
    chosen, scheme = VerifySettings(*settings), resolve_scheme(directory, settings[-1])
    bounds = QUANTIZED_BOUNDS[scheme] if scheme else BOUNDS[chosen.dtype]
    with count_bar() as progress:
        errors, logits = compare_networks(directory, plan, chosen, progress)
    failed, beyond_bounds = check_errors(errors, logits, chosen.dtype, scheme)
    failed = [*config_differences(directory, plan), *failed]
    if json_output:
        layers = [{name: _finite_or_none(value) for name, value in vars(error).items()} for error in errors]
        report: dict[str, Any] = {
            "layers": layers,
            "logits": {name: _finite_or_none(value) for name, value in vars(logits).items()},
        }
        report |= {"quantized": scheme, "bounds": vars(bounds), "beyond_bounds": beyond_bounds}
        print(json.dumps({**report, "failures": failed, "equal": not failed and scheme is None}))
    else:
        table = _make_table("part", ("max error", "relative"), "layer")
        shown = None
        for error in errors:
            part, shown = "" if error.part == shown else error.part, error.part
            numbers = (f"{error.maximum:.1e}", f"{error.relative:.1e}")
            style = None if error.relative <= bounds.relative else "red"
            table.add_row(part, error.layer, *numbers, style=style)
        _print_table(table, directory, plan)
        print(
            f"logits of {logits.positions} tokens: KL {logits.mean_kl:.1e} on average, {logits.max_kl:.1e} at most; "
            f"the same likeliest token at {logits.top1:.2%} of positions"
        )
    if failed:
        raise CheckpointError(f"{model}: does not compute what its source does: {summarize(failed, '; ')}")
    if not json_output and beyond_bounds:
        print(f"{model}: {scheme} costs more here than is usual: {'; '.join(beyond_bounds)}")
    elif not json_output:
        told = f"costs what {scheme} usually does" if scheme else f"computes what its source does, in {chosen.dtype}"
        largest = max(error.relative for error in errors)
        print(
            f"{model}: {told}: relative error {largest:.1e} at most (bound {bounds.relative:.0e}), "
            f"mean KL within {bounds.mean_kl:.0e}, top-1 above {bounds.top1:.1%}"
        )


def _finite_or_none(value: Any) -> Any:
    """JSON has neither infinity nor what is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _make_table(first: str, numbers: tuple[str, ...], *texts: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in (first, *texts):
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _print_table(table: Table, directory: ModelDirectory, plan: "ConversionPlan") -> None:
    from vllama_jax.convert.verify.weights import unrecorded_source_files

    Console().print(table)
    if others := unrecorded_source_files(directory, plan):
        print(f"note: the model was made from files of other names or sizes than {', '.join(others)}")
