"""Language models released as deltas: the sum equals FastChat's bit-exactly, and a wrong base is detected."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import (
    convert_command,
    convert_files,
    drop_components,
    expect_one_line,
    read_hashes,
    read_leaves,
    to_bytes,
)
from safetensors.numpy import load_file, save_file
from written_weights import LAYOUTS

from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli import main
from vllama_jax.convert.tiny import write_tiny

NORM = "model.norm.weight"
ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def save_llama(directory: Path, like: Path, tensors: dict[str, np.ndarray], layout: str | None = None) -> Path:
    """Write a language model directory like another, with other weights."""
    shutil.copytree(like, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    if layout:
        LAYOUTS[layout](tensors, directory)
    else:
        save_file(tensors, directory / "model.safetensors")
    fields = json.loads((directory / "config.json").read_text())
    fields["vocab_size"] = len(tensors[ROWS[0]])
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def tuned(base: dict[str, np.ndarray], dtype: str, size: float = 0.05) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: (tensor.astype(np.float32) + size * tensor.std() * rng.standard_normal(tensor.shape)).astype(dtype)
        for name, tensor in base.items()
    }


def fastchat_delta(target: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute a delta as FastChat 0.1.10's make_delta does: rows that the base lacks are zeros."""
    delta = {name: torch.from_numpy(tensor.copy()) for name, tensor in target.items()}
    for name, tensor in delta.items():
        held = torch.zeros_like(tensor)
        held[: len(base[name])] = torch.from_numpy(base[name]).to(tensor.dtype)
        tensor -= held
    return {name: tensor.numpy() for name, tensor in delta.items()}


def fastchat_sum(base: dict[str, np.ndarray], delta: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add a delta as FastChat's apply_delta does."""
    summed = {}
    for name, tensor in delta.items():
        held = torch.zeros_like(torch.from_numpy(tensor))
        held[: len(base[name])] = torch.from_numpy(base[name]).half()
        held += torch.from_numpy(tensor)
        summed[name] = held.numpy()
    return summed


def rounding(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference relative to the largest value."""
    ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def base(tiny_files, tmp_path_factory) -> Path:
    tensors = {
        name: tensor.astype(np.float16) for name, tensor in load_file(tiny_files["llama"] / "model.safetensors").items()
    }
    return save_llama(tmp_path_factory.mktemp("delta") / "base", tiny_files["llama"], tensors)


def weights(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [None, "bin shards"])
@pytest.mark.parametrize("new_rows", [0, 1])
def test_sum_equals_fastchat_bit_exactly(tiny_files, base, tmp_path, layout, new_rows):
    target = tuned(weights(base), "float16")
    rng = np.random.default_rng(1)
    for name in ROWS if new_rows else ():
        target[name] = np.concatenate([target[name], rng.standard_normal((new_rows, 64)).astype(np.float16)])
    delta = fastchat_delta(target, weights(base))
    directory = save_llama(tmp_path / "delta", base, delta, layout)
    summed = save_llama(tmp_path / "summed", directory, fastchat_sum(weights(base), delta))
    if layout is None:
        shutil.rmtree(directory)
        save_llama(directory, base, delta)
    main(convert_command(tiny_files | {"llama": base, "delta": directory}, tmp_path / "model"))
    leaves = convert_files(tiny_files | {"llama": summed}, tmp_path / "expected")
    assert read_hashes(tmp_path / "model") == read_hashes(tmp_path / "expected")
    assert leaves["llama/embedding"].shape == (512 + new_rows, 64)
    assert rounding(leaves["llama/embedding"], target[ROWS[0]]) < 1e-3
    sources = open_model(tmp_path / "model").manifest["sources"]["llama"]
    assert len(sources) == (2 if layout is None else 4)


def test_config_and_tokenizer_are_the_deltas(tiny_files, base, tmp_path):
    directory = save_llama(tmp_path / "delta", base, fastchat_delta(tuned(weights(base), "float16"), weights(base)))
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 4096}))
    (directory / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    main(convert_command(tiny_files | {"llama": base, "delta": directory}, tmp_path / "model"))
    assert open_model(tmp_path / "model").config.llama.max_length == 4096
    assert (tmp_path / "model" / "tokenizer" / "special_tokens_map.json").exists()


@pytest.mark.slow
def test_rotary_frequencies_are_not_added(tiny_files, base, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    frequencies = (10000.0 ** -(np.arange(0, 16, 2) / 16)).astype(np.float32)
    delta = fastchat_delta(tuned(weights(base), "float16"), weights(base))
    old = save_llama(tmp_path / "base", base, weights(base) | {name: frequencies})
    zeros = save_llama(tmp_path / "delta0", base, delta | {name: np.zeros(8, np.float32)})
    kept = save_llama(tmp_path / "delta1", base, delta | {name: frequencies})
    for number, (llama, directory) in enumerate([(old, zeros), (old, kept), (base, zeros)]):
        main(convert_command(tiny_files | {"llama": llama, "delta": directory}, tmp_path / f"model{number}"))
    assert read_hashes(tmp_path / "model0") == read_hashes(tmp_path / "model1") == read_hashes(tmp_path / "model2")
    other = save_llama(tmp_path / "delta2", base, delta | {name: frequencies * 2})
    text = expect_one_line(tiny_files | {"llama": old, "delta": other}, tmp_path)
    assert f"{name} is neither zero nor equal to that of {old}" in text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
def test_a_wrong_base_is_detected_whatever_the_size_of_the_delta(tiny_files, tmp_path, dtype, size):
    """The correct base is accepted in the same dtypes and sizes."""
    like = tiny_files["llama"]
    first, second = (
        {name: tensor.astype(dtype) for name, tensor in weights(path).items()}
        for path in (like, write_tiny(tmp_path / "other", seed=1)["llama"])
    )
    target = tuned(first, dtype, size)
    delta = save_llama(tmp_path / "delta", like, {name: target[name] - first[name] for name in first})
    right, wrong = save_llama(tmp_path / "right", like, first), save_llama(tmp_path / "wrong", like, second)
    leaves = converted_delta(tiny_files, right, delta, tmp_path / "model")
    assert rounding(leaves["llama/embedding"], target[ROWS[0]]) < 1e-2
    text = expect_one_line(tiny_files | {"llama": wrong, "delta": delta}, tmp_path)
    assert text.startswith(f"vllama: {delta}: made for another base than {wrong}: in ")
    assert text.endswith("give the base that it was made from, as it was published")


def converted_delta(paths: dict[str, Path], base: Path, delta: Path, out: Path) -> dict[str, np.ndarray]:
    main(convert_command(paths | {"llama": base, "delta": delta}, out))
    return read_leaves(out)


def test_a_base_with_reordered_rows_is_detected(tiny_files, base, tmp_path):
    delta = save_llama(tmp_path / "delta", base, fastchat_delta(tuned(weights(base), "float16"), weights(base)))
    turned = {name: np.ascontiguousarray(np.roll(tensor, 1, axis=0)) for name, tensor in weights(base).items()}
    text = expect_one_line(tiny_files | {"llama": save_llama(tmp_path / "b", base, turned), "delta": delta}, tmp_path)
    assert "made for another base" in text


@pytest.mark.slow
def test_sums_that_are_not_finite_are_refused(tiny_files, base, tmp_path):
    delta = fastchat_delta(tuned(weights(base), "float16"), weights(base))
    for number, value in enumerate((np.inf, np.nan, 65504)):
        spoiled = delta | {NORM: np.full_like(delta[NORM], value)}
        directory = save_llama(tmp_path / f"delta{number}", base, spoiled)
        large = save_llama(tmp_path / f"base{number}", base, weights(base) | {NORM: np.full_like(delta[NORM], 65000)})
        text = expect_one_line(tiny_files | {"llama": large, "delta": directory}, tmp_path)
        assert text == f"vllama: {directory}: base + delta of {NORM} is not finite; download both again"
        (tmp_path / "out").rmdir()


def test_a_delta_must_have_the_tensors_of_its_base(tiny_files, base, tmp_path):
    delta = fastchat_delta(tuned(weights(base), "float16"), weights(base))
    changes = {
        f"{NORM} is [32] in the delta and [64] in the base": delta | {NORM: delta[NORM][:32]},
        f"{NORM} is missing in the delta and [64] in the base": drop_components(delta, NORM),
        "more.weight is [64] in the delta and missing in the base, and 1 more differ": drop_components(delta, NORM)
        | {NORM: delta[NORM][:32], "more.weight": delta[NORM]},
        f"{ROWS[0]} is [511, 64] in the delta and [512, 64] in the base": delta | {ROWS[0]: delta[ROWS[0]][:511]},
    }
    for number, (message, tensors) in enumerate(changes.items()):
        directory = save_llama(tmp_path / f"delta{number}", base, tensors)
        text = expect_one_line(tiny_files | {"llama": base, "delta": directory}, tmp_path)
        (tmp_path / "out").rmdir()
        if "more differ" in message:
            assert ", and 1 more differ" in text
        else:
            assert text == f"vllama: {directory}: made for another model than {base}: {message}"


def test_a_delta_needs_its_base_and_must_be_a_directory(tiny_files, base, tmp_path):
    text = expect_one_line(drop_components(tiny_files, "llama") | {"delta": base}, tmp_path)
    assert text == f"vllama: --delta needs --llama, the language model that {base} is added to"
    (tmp_path / "out").rmdir()
    text = expect_one_line(tiny_files | {"delta": tmp_path / "absent"}, tmp_path)
    assert text == f"vllama: {tmp_path}/absent: no such directory; --delta takes a Hugging Face LLaMA directory"


def test_delta_on_a_base_model_replaces_its_language_model(tiny_files, tiny_model, base, tmp_path):
    delta = save_llama(tmp_path / "delta", base, fastchat_delta(tuned(weights(base), "float16"), weights(base)))
    main(convert_command({"llama": base, "delta": delta}, tmp_path / "one", "--base", str(tiny_model)))
    main(convert_command(tiny_files | {"llama": base, "delta": delta}, tmp_path / "two"))
    assert read_hashes(tmp_path / "one") == read_hashes(tmp_path / "two")
    assert to_bytes(read_leaves(tmp_path / "one")["vit/positions"]) == to_bytes(
        read_leaves(tiny_model)["vit/positions"]
    )
