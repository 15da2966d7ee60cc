"""The command `vllama verify`."""

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
from vllama_jax.cli._display import format_count
from vllama_jax.cli._progress import bytes_bar, count_bar
from vllama_jax.cli._usage import JsonFlag, require_at_least
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.io.json_files import read_object
from vllama_jax.io.paths import list_file_sizes

if TYPE_CHECKING:
    from vllama_jax.convert import ConversionPlan
    from vllama_jax.convert.verify.weights import CheckedCheckpoint


@dataclasses.dataclass(frozen=True)
class SourceFiles:
    """The PyTorch files of a model, by the options of `vllama convert`.

    Attributes:
        llama: The LLaMA directory.
        delta: A language model released as a delta of it.
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
    """Check the files of a model or a run, or compare a model with the PyTorch files that it was converted from.

    Example: vllama verify MODEL --against DIRECTORY_OF_THE_PYTORCH_FILES

    Without --against, the hashes of a model's files are recomputed; for a run, those of all checkpoints and of the base
    model. With --against, each layer runs here and in PyTorch on the same random inputs, and the outputs are compared.
    For quantized weights, the loss of accuracy is measured. The exit code is 1 if a file is corrupt or an output
    differs.

    Args:
        model: The model or run directory.
        against: The PyTorch files, or directories of them. Each file is identified by its tensors.
        source_files: Single files; these take precedence over --against.
        config: The JSON file that was given to `vllama convert --config`.
        weights_only: Compare the weights bit by bit, without running the model.
        dtype: The dtype of the computation here; PyTorch always computes in float32.
        tokens: The length of the prompt, limited by the model's context length.
        seed: The seed of the random inputs.
        quantize: Measure the loss of accuracy of int8 or int4. A model of `vllama quantize` does not need it.
        base: The base model of a run, if it has moved.
        json_output: Print one JSON object.
    """
    require_at_least(1, tokens=tokens)
    require_at_least(0, seed=seed)
    files = {component: path for component, path in vars(source_files).items() if path is not None}
    if not against and not files:
        if weights_only or quantize:
            option = "--weights-only" if weights_only else "--quantize"
            raise ConfigError(f"{option} compares with the PyTorch files: give them with --against")
        use_cpu_only()  # weights that a run trained are restored with JAX
        _verify_files(model, base, json_output)
        return
    directory = open_model(model, base)
    if weights_only and (scheme := resolve_scheme(directory, quantize)):
        raise ConfigError(f"{model}: {scheme} weights differ from the PyTorch files; leave out --weights-only")
    if weights_only:
        use_cpu_only()
    plan = _plan_conversion(directory, against, files, read_object(config, ConfigError) if config else None)
    if weights_only:
        _verify_weights(model, directory, plan, json_output)
    else:
        from vllama_jax.convert.verify.layers import check_installed

        check_installed()
        _verify_networks(model, directory, plan, (dtype, tokens, seed, quantize), json_output)


def _verify_files(model: Path, base: Path | None, json_output: bool) -> None:
    """Check the hashes of a model directory, and for a run also of all checkpoints."""
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
        report = {"weights": len(leaves), "bytes": size, "corrupt": corrupt}
        report |= {"checkpoints": [vars(found) | {"path": str(found.path)} for found in checkpoints]} if runs else {}
        print(json.dumps(report))
    else:
        for checkpoint in checkpoints:
            print(f"{checkpoint.path}: {_describe_checkpoint(checkpoint)}")
    if corrupt:
        problems = summarize([f"{path} ({reason})" for path, reason in corrupt.items()])
        restore = "restore it from a copy; a resumed run continues from its last intact checkpoint"
        advice = "copy or convert it again" if corrupt_weights else restore
        raise CheckpointError(f"{model}: corrupt: {problems}; {advice}")
    if not json_output:
        print(f"{directory.path}: {format_count(len(leaves), 'array')}, {filesize.decimal(size)}, intact")


def _checkpoint_bytes(run: RunDirectory) -> int:
    """Return the size of the files in the checkpoints of a run, in bytes."""
    steps = list_checkpoint_steps(run.path)
    return sum(size for step in steps for size in list_file_sizes(run.path / f"step_{step}").values())


def _describe_checkpoint(checkpoint: "CheckedCheckpoint") -> str:
    if checkpoint.damage:
        return "corrupt"
    if not checkpoint.digests:
        return "no digests recorded (saved by an earlier version); weights are readable"
    return f"{format_count(checkpoint.files, 'file')}, {filesize.decimal(checkpoint.bytes)}, intact"


def _weight_bytes(leaf: Mapping[str, Any]) -> int:
    import numpy as np

    return math.prod(leaf["shape"]) * np.dtype(leaf["dtype"]).itemsize


def _plan_conversion(
    directory: ModelDirectory, against: tuple[Path, ...], files: Mapping[str, Path], config: Mapping[str, Any] | None
) -> "ConversionPlan":
    """Plan the conversion of the PyTorch files, restricted to the components that the model was converted from."""
    from vllama_jax.convert import plan
    from vllama_jax.convert.discover import find_weight_files
    from vllama_jax.convert.verify.weights import unpublished_head_counts

    found = find_weight_files(against, files)
    paths = {name: source.files[0] for name, source in found.files.items()}
    paths |= {"llama": found.llama} if found.llama else {}
    selected = {name: path for name, path in paths.items() if name in directory.manifest["sources"]} | dict(files)
    if "llama" not in selected:
        raise ConfigError("no LLaMA directory among the PyTorch files; give it with --llama")
    llama, delta = selected.pop("llama"), selected.pop("delta", None)
    fields = unpublished_head_counts(directory.config) if config is None else config
    return plan(llama_directory=llama, delta=delta, files=selected, config=fields)


def _verify_weights(model: Path, directory: ModelDirectory, plan: "ConversionPlan", json_output: bool) -> None:
    from vllama_jax.convert.verify.weights import compare_weights, config_differences, summarize

    with bytes_bar(sum(_weight_bytes(leaf) for leaf in directory.manifest["leaves"].values())) as progress:
        components = compare_weights(directory, plan, progress)
    config = config_differences(directory, plan)
    different = [name for found in components for name in found.different]
    if json_output:
        report = {"components": [dataclasses.asdict(found) for found in components], "config": config}
        print(json.dumps({**report, "digest": directory.digest, "equal": not different and not config}))
    else:
        table = _make_table("component", ("tensors", "bytes", "verdict"))
        for found in components:
            verdict = f"{len(found.different)} different" if found.different else "equal"
            table.add_row(found.component, str(found.tensors), filesize.decimal(found.bytes), verdict)
        _print_table(table, directory, plan)
    if different or config:
        count = format_count(len(different), "array differs", "arrays differ")
        problems = [*config, *([f"{count}: {summarize(different)}"] if different else [])]
        raise CheckpointError(f"{model}: not equal to its PyTorch files: {'; '.join(problems)}")
    if not json_output:
        tensors = format_count(sum(found.tensors for found in components), "tensor")
        print(f"{model}: {tensors}, bit-exactly equal to the PyTorch files")


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
        report |= {
            "quantized": scheme,
            "bounds": vars(bounds),
            "beyond_bounds": beyond_bounds,
            "digest": directory.digest,
        }
        print(json.dumps({**report, "failures": failed, "equal": not failed and scheme is None}))
    else:
        table = _make_table("component", ("max error", "relative"), "layer")
        previous = None
        for error in errors:
            component, previous = "" if error.component == previous else error.component, error.component
            numbers = (f"{error.maximum:.1e}", f"{error.relative:.1e}")
            style = None if error.relative <= bounds.relative else "red"
            table.add_row(component, error.layer, *numbers, style=style)
        _print_table(table, directory, plan)
        print(
            f"logits of {logits.positions} tokens: mean KL {logits.mean_kl:.1e}, maximum {logits.max_kl:.1e}, "
            f"same top-1 token at {logits.top1:.2%} of positions"
        )
    if failed:
        raise CheckpointError(f"{model}: does not reproduce its PyTorch files: {summarize(failed, '; ')}")
    if not json_output and beyond_bounds:
        print(f"{model}: {scheme} loses more accuracy than usual: {'; '.join(beyond_bounds)}")
    elif not json_output:
        result = f"usual accuracy of {scheme}" if scheme else f"reproduces its PyTorch files in {chosen.dtype}"
        largest = max(error.relative for error in errors)
        print(
            f"{model}: {result}: relative error at most {largest:.1e} (bound {bounds.relative:.0e}), "
            f"mean KL within {bounds.mean_kl:.0e}, top-1 above {bounds.top1:.1%}"
        )


def _finite_or_none(value: Any) -> Any:
    """Replace infinity and NaN, which JSON does not have, by None."""
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
        print(f"note: the model was converted from files of other names or sizes than {', '.join(others)}")
