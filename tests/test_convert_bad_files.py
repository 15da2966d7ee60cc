"""Errors of `vllama convert` for files without weights and for wrong files: one clear line, and no output."""

import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import convert_command, drop_components, expect_one_line, plan
from safetensors.numpy import load_file, save_file
from written_weights import LFS, Hostile

import vllama_jax as vl
from vllama_jax.cli import main
from vllama_jax.convert.tiny import write_tiny

WHOLE = "must be an integer from 1 to 16777216, not"
ABOVE = "must be a number above 0 and at most"
FIELDS = ["eva_vit", "blip2", "imagebind", "minigpt4", "vl", "al"]


# Files without weights.


def torch_bytes(tmp_path: Path, **options) -> bytes:
    torch.save({"video_query_tokens": torch.ones(1000)}, tmp_path / "whole", **options)
    return (tmp_path / "whole").read_bytes()


def safetensors_bytes(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(64)


def header(**entry) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | entry}).encode()


def two_tensors(second: int) -> bytes:
    entry = {"dtype": "F32", "shape": [4]}
    offsets = {"a": [0, 16], "b": [second, second + 16]}
    return json.dumps({name: entry | {"data_offsets": offset} for name, offset in offsets.items()}).encode()


def zip_bytes(tmp_path: Path) -> bytes:
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("readme.txt", "no weights")
    return (tmp_path / "zip").read_bytes()


NO_WEIGHTS = {
    "empty": (lambda _: b"", "the file is empty; download or copy it again"),
    "lfs": (lambda _: LFS, "a git-lfs pointer, not the file itself; run `git lfs pull`"),
    "html": (lambda _: b"<!DOCTYPE html><html>404</html>", "an HTML page, not the file itself"),
    "random": (lambda _: np.random.default_rng(0).bytes(5000), "neither safetensors nor written by torch"),
    "short": (lambda _: b"abc", "neither safetensors nor written by torch"),
    "pickle of something else": (
        lambda _: pickle.dumps({"a": np.ones(3)}),
        "refused: its pickle contains other objects than",
    ),
    "half a pickle": (lambda _: b"\x80\x02\x8a\nl\xfc\x9cF", "not a weight file, or a corrupt one"),
    "noise after a pickle's start": (
        lambda _: b"\x80\x02" + bytes(range(256)),
        "not a weight file, or a corrupt one",
    ),
    "truncated torch": (lambda tmp: torch_bytes(tmp)[:2000], "corrupt one (File is not a zip file"),
    "truncated old torch": (
        lambda tmp: torch_bytes(tmp, _use_new_zipfile_serialization=False)[:-500],
        "corrupt one (unexpected EOF",
    ),
    "zip of something else": (zip_bytes, "not a weight file, or a corrupt one"),
    "zip's start and noise": (lambda _: b"PK\x03\x04" + bytes(5000), "not a weight file, or a corrupt one"),
    "truncated safetensors": (lambda _: safetensors_bytes(header(shape=[900], data_offsets=[0, 3600])), "corrupt"),
    "absurd header length": (lambda _: safetensors_bytes(b"{}", 2**63), "corrupt safetensors file"),
    "header longer than the file": (lambda _: safetensors_bytes(b"{}", 10_000), "corrupt safetensors file"),
    "header that is no JSON": (lambda _: safetensors_bytes(b"{" + b"x" * 50), "corrupt safetensors file"),
    "absurd shape": (lambda _: safetensors_bytes(header(shape=[2**40, 2**40])), "corrupt safetensors file"),
    "offsets beyond the file": (lambda _: safetensors_bytes(header(data_offsets=[2**50, 2**50 + 16])), "corrupt"),
    "negative shape": (lambda _: safetensors_bytes(header(shape=[-4])), "corrupt safetensors file"),
    "shape that is negative twice": (lambda _: safetensors_bytes(header(shape=[-2, -2])), "corrupt safetensors file"),
    "shape of fractions": (lambda _: safetensors_bytes(header(shape=[4.0])), "corrupt safetensors file"),
    "offsets before the file": (lambda _: safetensors_bytes(header(data_offsets=[-16, 0])), "corrupt safetensors file"),
    "overlapping tensors": (lambda _: safetensors_bytes(two_tensors(8)), "corrupt safetensors file"),
    "one place for two tensors": (lambda _: safetensors_bytes(two_tensors(0)), "corrupt safetensors file"),
    "a hole between tensors": (lambda _: safetensors_bytes(two_tensors(32)), "corrupt safetensors file"),
    "header nested too deep": (lambda _: safetensors_bytes(b'{"a":' + b"[" * 10**5), "corrupt safetensors file"),
    "offsets the wrong way": (lambda _: safetensors_bytes(header(data_offsets=[16, 0])), "corrupt safetensors file"),
}


@pytest.mark.parametrize("corrupt", NO_WEIGHTS)
def test_a_file_without_weights_is_refused(tiny_files, tmp_path, corrupt):
    make, message = NO_WEIGHTS[corrupt]
    path = tmp_path / "file.pth"
    path.write_bytes(make(tmp_path))
    text = expect_one_line(tiny_files | {"vl": path}, tmp_path)
    assert message in text
    assert str(path) in text


def test_corrupt_safetensors_files_are_refused(tiny_files, tmp_path):
    path = tmp_path / "vl.safetensors"
    path.write_bytes(tiny_files["vl"].read_bytes()[:5])
    assert f"{path}: corrupt safetensors file" in expect_one_line(tiny_files | {"vl": path}, tmp_path)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([torch.ones(3)], "not a weight file (a list, not named tensors)"),
        (torch.ones(3), "not a weight file (a Tensor, not named tensors)"),
        ({"model": {"epoch": 3}}, "not a weight file ('epoch' in it is not a tensor)"),
        (
            {},
            "it is not a Video-LLaMA vision-language checkpoint (no tensor video_query_tokens; it contains no tensors)",
        ),
    ],
)
def test_a_torch_file_without_tensors_is_refused(tiny_files, tmp_path, saved, message):
    torch.save(saved, tmp_path / "file.pth")
    assert message in expect_one_line(tiny_files | {"vl": tmp_path / "file.pth"}, tmp_path)


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_file_or_directory_is_one_line(tiny_files, tmp_path, field):
    absent, folder = tmp_path / "absent.pth", tmp_path / "folder"
    folder.mkdir()
    assert f"{absent}: no such file" in expect_one_line(tiny_files | {field: absent}, tmp_path)
    (tmp_path / "out").rmdir()
    assert f"{folder}: a directory, not a file" in expect_one_line(tiny_files | {field: folder}, tmp_path)


@pytest.mark.parametrize("kind", ["vl", "al", "blip2", "eva_vit", "imagebind", "minigpt4"])
def test_a_number_with_a_declared_size_of_a_terabyte_is_refused(tiny_files, tmp_path, kind):
    tensors = {name: torch.from_numpy(tensor) for name, tensor in load_file(tiny_files[kind]).items()}
    name, tensor = max(tensors.items(), key=lambda item: item[1].ndim)
    tensors[name] = torch.ones([1] * tensor.ndim).expand(2**38, *tensor.shape[1:])
    torch.save(tensors, tmp_path / "file.pth")
    text = expect_one_line(tiny_files | {kind: tmp_path / "file.pth"}, tmp_path)
    assert text.startswith(f"vllama: {tmp_path}/file.pth: {name} has shape [{2**38}, ")


def test_a_huge_axis_next_to_an_empty_one_is_refused(tiny_files, tmp_path):
    entry = {"dtype": "F32", "shape": [1, 0, 2**60], "data_offsets": [0, 0]}
    head = json.dumps({"video_query_tokens": entry}).encode()
    (tmp_path / "file.pth").write_bytes(len(head).to_bytes(8, "little") + head)
    assert "but 3 axes are expected" in expect_one_line(tiny_files | {"vl": tmp_path / "file.pth"}, tmp_path)


def test_zip_whose_names_leave_the_directory_writes_nothing(tiny_files, tmp_path):
    full = tmp_path / "deep" / "er" / "file.pth"
    full.parent.mkdir(parents=True)
    torch.save({"video_query_tokens": torch.ones(3)}, full)
    with zipfile.ZipFile(full, "a") as file:
        file.writestr("../../slipped", "out")
        file.writestr("/tmp/vllama_slipped", "out")
    assert str(full) in expect_one_line(tiny_files | {"vl": full}, tmp_path)
    assert not list(tmp_path.rglob("*slipped"))
    assert not Path("/tmp/vllama_slipped").exists()


# Pickles that would run code.


@pytest.mark.parametrize("layout", ["zip", "old", "bare"])
@pytest.mark.parametrize("field", [*FIELDS, "llama", "shard", "delta"])
def test_a_hostile_pickle_is_refused_without_running_it(tiny_files, tmp_path, field, layout):
    marker, path = tmp_path / "marker", tmp_path / "hostile.pth"
    if field not in FIELDS:
        directory = shutil.copytree(tiny_files["llama"], tmp_path / "llama")
        (directory / "model.safetensors").unlink()
        path = directory / "pytorch_model.bin"
    if field == "shard":
        path = directory / "pytorch_model-00002-of-00002.bin"
        torch.save({"model.norm.weight": torch.ones(64)}, directory / "pytorch_model-00001-of-00002.bin")
        shards = {"a": "pytorch_model-00001-of-00002.bin", "b": path.name}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
        field = "llama"
    if layout == "bare":
        path.write_bytes(pickle.dumps({"model": Hostile(marker)}, protocol=2))
    else:
        torch.save({"model": {"a": Hostile(marker)}}, path, _use_new_zipfile_serialization=layout == "zip")
    text = expect_one_line(tiny_files | {field: path if field in FIELDS else path.parent}, tmp_path)
    assert f"{path}: refused: its pickle refers to {os.system.__module__}.system" in text
    assert not marker.exists()


def test_without_torch_only_safetensors_convert(tiny_files, tmp_path, monkeypatch):
    pth = write_tiny(tmp_path / "files", format="pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert len(plan(tiny_files).leaves) == len(plan(tiny_files | {"vl": tiny_files["vl"]}).leaves) > 100
    with pytest.raises(
        vl.CheckpointError,
        match=r"vl\.pth: reading torch files needs torch, which is not installed: pip install",
    ):
        plan(tiny_files | {"vl": pth["vl"]})


# A file given for another component.

WHAT = {
    "eva_vit": "EVA-CLIP ViT-g weights",
    "blip2": "BLIP-2 Q-Former weights",
    "imagebind": "ImageBind weights",
    "minigpt4": "a MiniGPT-4 projection",
    "vl": "a Video-LLaMA vision-language checkpoint",
    "al": "a Video-LLaMA audio-language checkpoint",
    "llama": "LLaMA weights",
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("held", WHAT)
def test_wrong_kind_of_file_is_named_and_its_option(tiny_files, tmp_path, field, held):
    if field == held:
        return
    path = tiny_files["llama"] / "model.safetensors" if held == "llama" else tiny_files[held]
    text = expect_one_line(tiny_files | {field: path}, tmp_path)
    options = f"given as --{field.replace('_', '-')}", f"give it as --{held.replace('_', '-')}"
    assert text == f"vllama: {path}: {options[0]}, but it is {WHAT[held]}; {options[1]}"


def test_weights_of_no_known_component_are_refused(tiny_files, tmp_path):
    save_file({f"layer.{number}": np.ones(3) for number in range(5)}, tmp_path / "other.safetensors")
    text = expect_one_line(tiny_files | {"blip2": tmp_path / "other.safetensors"}, tmp_path)
    assert "it is not BLIP-2 Q-Former weights (no tensor query_tokens; it contains layer.0, " in text


def test_audio_branch_needs_imagebind(tiny_files, tmp_path):
    text = expect_one_line(drop_components(tiny_files, "imagebind"), tmp_path)
    assert text == "vllama: --al needs --imagebind, which encodes the input of the audio branch"


# The language model's directory.


def change_config(**fields):
    def change(directory: Path) -> None:
        old = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(old | fields))

    return change


def write(name: str, data: bytes):
    return lambda directory: (directory / name).write_bytes(data)


def index(weight_map: object):
    def change(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "model-1.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


LLAMA_DAMAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json; --llama takes a Hugging Face LLaMA"),
    "config is no JSON": (write("config.json", b"{'a'"), "config.json: not JSON"),
    "config is an lfs pointer": (write("config.json", LFS), "config.json: a git-lfs pointer"),
    "other model": (
        change_config(model_type="qwen3_moe"),
        "model_type 'qwen3_moe' is not supported; --llama takes one of llama, mistral, qwen2, qwen3",
    ),
    "biases": (change_config(attention_bias=True), "attention_bias is True, which is not supported; only false is"),
    "other activation": (change_config(hidden_act="gelu"), "activation 'gelu'"),
    "no width": (change_config(hidden_size=None), f"hidden_size {WHOLE} None"),
    "no heads": (
        change_config(num_attention_heads=0),
        f"num_attention_heads {WHOLE} 0",
    ),
    "width is text": (
        change_config(hidden_size="64"),
        f"hidden_size {WHOLE} '64'",
    ),
    "epsilon is text": (
        change_config(rms_norm_eps="small"),
        f"rms_norm_eps {ABOVE} 1, not 'small'",
    ),
    "other scaling": (
        change_config(rope_scaling={"type": "yarn"}),
        "rotary scaling 'yarn' is not supported",
    ),
    "half a scaling": (change_config(rope_scaling={"type": "llama3"}), "rotary scaling 'llama3' has no factor, low_"),
    "more layers": (
        change_config(num_hidden_layers=80),
        "has 3 layers, but llama.depth is 80; check num_hidden_layers in its config.json",
    ),
    "absurdly more": (
        change_config(num_hidden_layers=10**9),
        f"num_hidden_layers {WHOLE} 1000000000",
    ),
    "absurd width": (change_config(hidden_size=2**62), f"hidden_size {WHOLE} 46"),
    "absurd length": (
        change_config(max_position_embeddings=10**30),
        f"max_position_embeddings {WHOLE} 10",
    ),
    "absurd heads": (
        change_config(num_attention_heads=2**24, num_key_value_heads=1, head_dim=2),
        "× head_dim 2 exceeds",
    ),
    "rotary base of nothing": (
        change_config(rope_theta=-1.0),
        f"rope_theta {ABOVE} 1e+12, not -1.0",
    ),
    "config nested too deep": (
        write("config.json", b"[" * 10**5),
        "config.json: JSON is nested too deeply",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors, pytorch_model.bin or index"),
    "missing shard": (index({"a": "model-1.safetensors", "b": "model-2.safetensors"}), "model-2.safetensors: no such"),
    "index without a map": (index(None), "not an index of shards"),
    "index of numbers": (index({"a": 1}), "not an index of shards"),
    "index that leaves the directory": (index({"a": "../x.safetensors"}), "not an index of shards"),
    "index of a system file": (index({"a": "../../../../../etc/passwd"}), "not an index of shards"),
    "index of a whole path": (index({"a": "/etc/passwd"}), "not an index of shards"),
    "index of the directory": (index({"a": ".."}), "not an index of shards"),
    "index of no possible name": (index({"a": "x\0y"}), "no such file; check the path"),
    "index of a file that is no weights": (index({"a": "tokenizer.model"}), "neither safetensors nor written by torch"),
    "empty weights": (write("model.safetensors", b""), "model.safetensors: the file is empty"),
    "weights are an lfs pointer": (write("model.safetensors", LFS), "model.safetensors: a git-lfs pointer"),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), "no tokenizer in"),
    "tokenizer is an lfs pointer": (write("tokenizer.model", LFS), "tokenizer.model: a git-lfs pointer"),
    "tokenizer is noise": (write("tokenizer.model", b"noise"), "tokenizer.model is not a SentencePiece model"),
    "tokenizer has more tokens": (
        write("added_tokens.json", json.dumps({f"<{n}>": 512 + n for n in range(3)}).encode()),
        "the tokenizer does not match the embeddings: it has 515 tokens, the embedding table has 512 rows",
    ),
}


def test_tokenizer_files_that_are_links_are_copied(tiny_files, tmp_path):
    directory = shutil.copytree(tiny_files["llama"], tmp_path / "llama")
    (directory / "tokenizer.model").unlink()
    (directory / "tokenizer.model").symlink_to(tiny_files["llama"] / "tokenizer.model")
    main(convert_command(tiny_files | {"llama": directory}, tmp_path / "model"))
    copy = tmp_path / "model" / "tokenizer" / "tokenizer.model"
    assert not copy.is_symlink()
    assert copy.read_bytes() == (tiny_files["llama"] / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("corrupt", LLAMA_DAMAGES)
def test_a_directory_without_a_language_model_is_refused(tiny_files, tmp_path, corrupt):
    directory = shutil.copytree(tiny_files["llama"], tmp_path / "llama")
    act, message = LLAMA_DAMAGES[corrupt]
    act(directory)
    assert message in expect_one_line(tiny_files | {"llama": directory}, tmp_path)


@pytest.mark.parametrize(("name", "what"), [("model.safetensors", "not a directory"), ("none", "no such directory")])
def test_a_language_model_must_be_a_directory(tiny_files, tmp_path, name, what):
    path = tiny_files["llama"] / name
    text = expect_one_line(tiny_files | {"llama": path}, tmp_path)
    assert text == f"vllama: {path}: {what}; --llama takes a Hugging Face LLaMA directory"
