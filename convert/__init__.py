"""Weights in PyTorch's layouts → a model directory, and back (export.py). The only package that knows PyTorch names."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllama_jax import checkpoint
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.errors import ConfigError
from vllama_jax.params import ParamsWriter, write_file

from . import directory as directories
from . import llama
from .infer import model_config
from .matching import Leaf, abstract_shapes, match, tables
from .pieces import PIECES, check_kind
from .sources import Source, open_file, open_llama

__all__ = ["PIECES", "Leaf", "Plan", "abstract_shapes", "bytes_to_write", "convert", "plan", "tables"]

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion in which everything was found and fits, before a byte of it is read."""

    config: VideoLlamaConfig
    leaves: list[Leaf]
    left_out: dict[str, int]  # reason → how many tensors
    pieces: dict[str, Source]
    tokenizer_directory: Path
    found: list[str]  # what was taken from a directory, and what left aside there: a line for each file


def plan(
    *,
    directory: str | Path | None = None,
    llama_directory: str | Path | None = None,
    files: Mapping[str, str | Path | None],
    config: Mapping[str, Any] | None = None,
    template: str | None = None,
) -> Plan:
    """Checks that the files make a model: every weight found once, of the right shape, and nothing left over.

    directory: is searched for pieces, told by what they hold; what is given by name is not taken from there.
    files: paths by kind, as PIECES names them. config: any part of a model config. template: of the prompt; the
    config's unless given. The language model, eva_vit and blip2 must be there.
    Raises CheckpointError listing all that is missing, misshapen or not used; ConfigError for what `config` says.
    """
    from vllama_jax.text.prompts import find_template
    from vllama_jax.text.tokenizer import check_vocabulary, load_tokenizer

    given = {kind: Path(path) for kind, path in files.items() if path is not None}
    if unknown := given.keys() - PIECES.keys() | given.keys() & {"llama"}:
        raise ConfigError(f"no such kind of file: {', '.join(sorted(unknown))}; known are {', '.join(PIECES)}")
    named = [*given, *(["llama"] if llama_directory else [])]
    found = directories.search(Path(directory), named) if directory else directories.Found({}, None, [])
    home = llama_directory or found.llama
    _check_complete([*named, *found.files, *(["llama"] if found.llama else [])], directory)
    home = Path(home)
    llama_fields = llama.read_config(home)
    opened = {path: open_file(path) for path in dict.fromkeys(given.values())}  # one file may be two pieces
    pieces = found.files | {kind: opened[path] for kind, path in given.items()} | {"llama": open_llama(home)}
    for kind, source in pieces.items():
        check_kind(kind, source)
    override = {**(config or {}), **({"template": template} if template else {})}
    cfg = model_config(pieces, llama_fields, override)
    find_template(cfg.template)
    check_vocabulary(load_tokenizer(home), cfg.llama.vocab_size)
    leaves, left_out = match(cfg, pieces)
    return Plan(cfg, leaves, left_out, pieces, home, found.report)


def _check_complete(kinds: Sequence[str], directory: str | Path | None) -> None:
    if lacking := [PIECES[kind].option for kind in ("llama", "eva_vit", "blip2") if kind not in kinds]:
        where = f", and {directory} holds none" if directory else ""
        raise ConfigError(f"every model needs {', '.join(lacking)}{where}")
    if "al" in kinds and "imagebind" not in kinds:
        raise ConfigError("--al needs --imagebind: the audio branch hears through ImageBind")


def convert(plan: Plan, out: str | Path, *, dtype: str | None = None, progress: Progress = lambda done: None) -> None:
    """Writes the model directory that `plan` describes; `out` appears when it is whole.

    dtype: of the weights on disk; each one's own unless given. progress is called with the bytes written since.
    Raises CheckpointError when `out` exists or cannot be written, and when a value is too large for `dtype`.
    """
    with checkpoint.new_directory(Path(out)) as directory:
        with ParamsWriter(directory / "params") as params:
            for leaf in sorted(plan.leaves, key=lambda leaf: leaf.rule.target):
                target = np.dtype(dtype) if dtype else leaf.dtype
                params.write(leaf.rule.target, leaf.shape, target, _counted(leaf.blocks(target), progress))
        _copy_tokenizer(plan.tokenizer_directory, directory / "tokenizer")
        checkpoint.write_config(directory, plan.config)
        files = {kind: [_described(file) for file in source.files] for kind, source in plan.pieces.items()}
        checkpoint.write_manifest(directory, files, params.leaves)


def bytes_to_write(plan: Plan, dtype: str | None = None) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(dtype or leaf.dtype).itemsize for leaf in plan.leaves)


def _counted(blocks: Iterator[np.ndarray], progress: Progress) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block
        progress(block.nbytes)


def _copy_tokenizer(directory: Path, out: Path) -> None:
    from vllama_jax.text.tokenizer import tokenizer_files

    out.mkdir()
    for file in tokenizer_files(directory):
        write_file(out / file.name, file.read_bytes())


def _described(file: Path) -> dict[str, Any]:
    return {"name": file.name, "size": file.stat().st_size}
