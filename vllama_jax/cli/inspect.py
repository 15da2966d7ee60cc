"""The command `vllama inspect`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import tyro
from rich import filesize
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from vllama_jax.branches import get_component
from vllama_jax.checkpoints.directory import ModelDirectory, open_model
from vllama_jax.checkpoints.stored_weights import StoredWeight, list_weights
from vllama_jax.cli._display import format_count
from vllama_jax.cli._usage import JsonFlag


def inspect(
    model: tyro.conf.Positional[Path],
    /,
    *,
    tree: bool = False,
    base: Path | None = None,
    json_output: JsonFlag = False,
) -> None:
    """List the components of a model: parameters, dtype and size. For a run, also what it trained and its base model.

    Example: vllama inspect MODEL --tree

    Args:
        model: The model or run directory.
        tree: List every array with its shape instead of components.
        base: The base model of a run, if it has moved.
        json_output: Print one JSON object.
    """
    directory = open_model(model, base)
    leaves = list_weights(directory)
    if json_output:
        print(json.dumps(_make_report(model, directory, leaves)))
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(Text(_format_heading(model, directory)))
    console.print(_make_tree(model, leaves) if tree else _make_table(leaves))


def _format_heading(model: Path, directory: ModelDirectory) -> str:
    files = [file["name"] for files in directory.manifest["sources"].values() for file in files]
    template = f"prompt template {directory.config.template}"
    quantized = f", quantized to {directory.quantized}" if directory.quantized else ""
    lines = [f"{directory.path}: {template}{quantized}; source files {', '.join(files)}"]
    for trained in directory.trained:
        lora = f", LoRA of rank {trained.lora.rank}" if trained.lora.rank else ""
        lines.append(f"{trained.path.parent}: {format_count(len(trained.leaves), 'trained array')}{lora}")
    if directory.trained:
        lines[0] = f"{model}: a run with the base model {lines[0]}"
    return "\n".join(lines)


def _make_table(leaves: list[StoredWeight]) -> Table:
    """Return a table with a row for each component, dtype and checkpoint."""
    table = Table(box=None, pad_edge=False)
    columns: dict[str, Literal["left", "right"]] = {
        "component": "left",
        "parameters": "right",
        "dtype": "left",
        "bytes": "right",
        "": "left",
    }
    for name, justify in columns.items():
        table.add_column(name, justify=justify)
    groups: dict[tuple[str, str, str], list[StoredWeight]] = {}
    for leaf in leaves:
        groups.setdefault((get_component(leaf.path), leaf.dtype, leaf.checkpoint), []).append(leaf)
    for (component, dtype, checkpoint), group in groups.items():
        table.add_row(component, *_format_totals(group, dtype), "trained" if checkpoint else "")
    table.add_row("total", *_format_totals(leaves, ""))
    return table


def _format_totals(leaves: Iterable[StoredWeight], dtype: str) -> tuple[str, str, str]:
    leaves = list(leaves)
    return f"{sum(leaf.parameters for leaf in leaves):,}", dtype, filesize.decimal(sum(leaf.bytes for leaf in leaves))


def _make_tree(model: Path, leaves: list[StoredWeight]) -> Tree:
    root = Tree(Text(str(model)))
    branches: dict[str, Tree] = {"": root}
    for leaf in leaves:
        *parents, name = leaf.path.split("/")
        parent = ""
        for step in parents:
            child = f"{parent}{step}/"
            if child not in branches:
                branches[child] = branches[parent].add(Text(step))
            parent = child
        label = f"{name} {list(leaf.shape)} {leaf.dtype}, {filesize.decimal(leaf.bytes)}"
        branches[parent].add(Text(label + (", trained" if leaf.checkpoint else "")))
    return root


def _make_report(model: Path, directory: ModelDirectory, leaves: list[StoredWeight]) -> dict:
    components: dict[str, dict[str, int]] = {}
    for leaf in leaves:
        totals = components.setdefault(get_component(leaf.path), {"parameters": 0, "bytes": 0})
        totals["parameters"] += leaf.parameters
        totals["bytes"] += leaf.bytes
    arrays = {
        leaf.path: {"shape": leaf.shape, "dtype": leaf.dtype, "bytes": leaf.bytes, "trained": bool(leaf.checkpoint)}
        for leaf in leaves
    }
    return {
        "model": str(model),
        "base": str(directory.path) if directory.trained else None,
        "template": directory.config.template,
        "quantized": directory.quantized,
        "sources": directory.manifest["sources"],
        "components": components,
        "leaves": arrays,
    }
