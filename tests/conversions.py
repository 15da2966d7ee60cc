"""Convert files for tests and read the results as plain arrays, without the project's own reader."""

import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from flax.traverse_util import flatten_dict

from vllama_jax import convert
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli import main

Leaves = dict[str, np.ndarray]


def plan(paths: dict[str, Path], **options) -> convert.ConversionPlan:
    """Plan a conversion of files by component; `config` is the file with the head counts, unless given."""
    files = {kind: path for kind, path in paths.items() if kind not in ("llama", "config")}
    config = options.pop("config", None) or json.loads(paths["config"].read_text())
    return convert.plan(llama_directory=paths["llama"], files=files, config=config, **options)


def read_leaves(model: Path) -> Leaves:
    """Read the weights of a model directory by path, with Orbax alone."""
    return flatten_dict(ocp.PyTreeCheckpointer().restore(model / "params"), sep="/")


def convert_files(paths: dict[str, Path], out: Path, *, dtype: str | None = None, **options) -> Leaves:
    convert.convert(plan(paths, **options), out, dtype=dtype)
    return read_leaves(out)


def read_torch_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a torch file or of a directory's `.bin` shards, with torch alone."""
    if path.is_dir():
        return {
            name: tensor for shard in sorted(path.glob("*.bin")) for name, tensor in read_torch_tensors(shard).items()
        }
    loaded = torch.load(path, weights_only=True)
    return loaded.get("model", loaded)


def to_bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def drop_components(paths: dict[str, Path], *components: str) -> dict[str, Path]:
    return {kind: path for kind, path in paths.items() if kind not in components}


def read_hashes(model: Path) -> dict[str, str]:
    return {path: leaf["xxh3_128"] for path, leaf in open_model(model).manifest["leaves"].items()}


def convert_command(paths: dict[str, Path], out: Path, *more: str) -> list[str]:
    """Return the arguments of `vllama convert`."""
    options = [argument for kind, path in paths.items() for argument in (f"--{kind.replace('_', '-')}", str(path))]
    return ["convert", *options, "--out", str(out), *more]


def expect_refusal(paths: dict[str, Path], tmp_path: Path, *more: str) -> str:
    """Return the error of a command that exits with 1, and check that it has written nothing."""
    out = tmp_path / "out" / "model"
    out.parent.mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(convert_command(paths, out, *more))
    assert isinstance(stopped.value.code, str), "exit code 1 and a message, not a code alone"
    assert not list(out.parent.iterdir())
    return stopped.value.code


def expect_one_line(paths: dict[str, Path], tmp_path: Path, *more: str) -> str:
    message = expect_refusal(paths, tmp_path, *more)
    assert message.startswith("vllama: ")
    assert "\n" not in message
    return message
