"""Mutated weight files and model directories: a one-line error or a correct model, never a traceback.

Each mutation has its own seed, so that it can be reproduced alone: VLLAMA_FUZZ=17.
"""

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversions import convert_command, read_hashes
from safetensors.numpy import load_file, save_file

import vllama_jax as vl
from vllama_jax.cli import main
from vllama_jax.errors import VllamaError

pytestmark = pytest.mark.slow

VALUES = [-1, 0, 1, 2.5, 2**40, 1e300, True, None, "", "text", [], [1], {}, {"a": 1}, "\udcff", "../..", "x" * 5000]
LONGEST = 6000  # characters of a message that lists many tensors
KINDS = ["eva_vit", "blip2", "imagebind", "minigpt4", "vl", "al", "llama"]


# Bytes


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Change some bytes, most of them at the start or the end, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 3, 20])):
        where = rng.choice([rng.randrange(len(data)), rng.randrange(min(400, len(data)))])
        changed[rng.choice([where, len(data) - 1 - where])] ^= 1 << rng.randrange(8)
    return bytes(changed)


def spliced(rng: random.Random, data: bytes) -> bytes:
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice([data[:begin] + data[end:], data[:end] + data[begin:], data + data[begin:end]])


def json_value(rng: random.Random, data: bytes) -> bytes:
    """Replace, remove or add a value in a JSON file."""
    tree = json.loads(data)
    locations = list(_json_locations(tree))
    owner, key = rng.choice(locations)
    act = rng.randrange(4)
    if act == 0:
        del owner[key]
    elif act == 1 and isinstance(owner, dict):
        owner[rng.choice(["extra", "../x", "", "a/b"])] = owner[key]
    else:
        owner[key] = rng.choice(VALUES)
    return json.dumps(tree).encode()


def _json_locations(tree: object):
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    for key, value in items:
        yield tree, key
        yield from _json_locations(value)


def mutate_file(rng: random.Random, path: Path) -> str:
    """Change a file; return a description."""
    data = path.read_bytes()
    changes: list[Callable] = [truncated, flipped, spliced] if data else []
    if path.suffix == ".json" or path.name in (".zarray", "_METADATA"):
        changes += [json_value] * 4
    change = rng.choice(changes or [lambda rng, data: b"x"])
    path.write_bytes(change(rng, data))
    return f"{change.__name__} {path.name}"


# Weight files


def renamed_tensors(rng: random.Random, path: Path) -> str:
    """Rename, remove or reshape a tensor of a safetensors file, or change its dtype."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    act = rng.choice(["rename", "remove", "reshape", "dtype"])
    tensor = tensors.pop(name)
    if act == "rename":
        tensors[rng.choice(["other", f"module.{name}", name.upper()])] = tensor
    elif act == "reshape":
        tensors[name] = tensor.reshape(-1)[: max(1, tensor.size // 2)].copy()
    elif act == "dtype":
        tensors[name] = tensor.astype(rng.choice(["int64", "float64", "uint8"]))
    save_file(tensors, path)
    return f"{act} {name}"


def mutated_weights(rng: random.Random, files: dict[str, Path], folder: Path) -> tuple[dict[str, Path], str]:
    """Return the files with one of them changed."""
    kind = rng.choice(KINDS)
    if kind == "llama":
        directory = shutil.copytree(files["llama"], folder / "llama")
        path = rng.choice(sorted(directory.iterdir()))
        return files | {"llama": directory}, mutate_file(rng, path)
    path = Path(shutil.copy(files[kind], folder / f"{kind}.safetensors"))
    if rng.randrange(2):
        return files | {kind: path}, renamed_tensors(rng, path)
    if rng.randrange(2):
        tensors = {name: torch.from_numpy(tensor) for name, tensor in load_file(path).items()}
        path = folder / f"{kind}.pth"
        torch.save({"model": tensors}, path, _use_new_zipfile_serialization=bool(rng.randrange(4)))
    return files | {kind: path}, mutate_file(rng, path)


def numbers(count: int) -> list[int]:
    return [int(os.environ["VLLAMA_FUZZ"])] if "VLLAMA_FUZZ" in os.environ else list(range(count))


def attempt(arguments: list[str]) -> str | None:
    """Return the error of a command, or None without one. Any other exception fails the test."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as stopped:
            message = stopped.code
        else:
            return None
    assert isinstance(message, str), f"exit code {message}"
    assert message.startswith("vllama: ")
    assert len(message) < LONGEST
    return message


@pytest.mark.parametrize("number", numbers(30))
def test_mutated_weight_files_convert_or_are_refused(tiny_files, tiny_model, tmp_path, number):
    """A conversion fails with a message and leaves nothing, or makes a model that loads."""
    rng = random.Random(number)
    files, what = mutated_weights(rng, tiny_files, tmp_path)
    out = tmp_path / "out" / "model"
    out.parent.mkdir()
    message = attempt(convert_command(files, out))
    if message is not None:
        assert not list(out.parent.iterdir()), what
    else:
        assert read_hashes(out).keys() <= read_hashes(tiny_model).keys(), what
        assert attempt(["verify", str(out)]) is None, what


@pytest.mark.parametrize("number", numbers(40))
def test_mutated_model_directories_load_or_are_refused(tiny_model, tmp_path, number):
    """Only errors of ours are raised, and `verify` detects every change of weights."""
    rng = random.Random(1000 + number)
    model = shutil.copytree(tiny_model, tmp_path / "model")
    own = [path for path in sorted(model.iterdir()) if path.is_file()]
    inside = [path for path in sorted(model.rglob("*")) if path.is_file() and path not in own]
    path = rng.choice(rng.choice([own, inside]))
    before = path.read_bytes()
    act = rng.randrange(8)
    if act == 0:
        path.unlink()
        what = f"removed {path.name}"
    elif act == 1:
        path.rename(path.with_name("renamed"))
        what = f"renamed {path.name}"
    else:
        what = mutate_file(rng, path)
    attempt(["inspect", str(model), "--tree"])
    message = attempt(["verify", str(model)])
    is_chunk = "params" in path.parts and path.name[0] not in "._"
    if is_chunk and (not path.exists() or path.read_bytes() != before):
        assert message is not None, what
    with contextlib.suppress(VllamaError):
        assert vl.load(model).config, what
