"""Weights as training and other libraries save them.

Redundant ones are compared, and the prefixes of wrappers are removed.
"""

import dataclasses
import json
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from conversions import convert_command, expect_one_line, expect_refusal, plan, read_hashes
from safetensors.numpy import load_file, save_file

import vllama_jax as vl
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli import main
from vllama_jax.config import tiny
from vllama_jax.convert.tiny import write_tiny
from vllama_jax.nn.llama import rope_frequencies

INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"
LLAMA = tiny(vocab_size=512).llama


def changed_llama(files: dict[str, Path], tmp_path: Path, tensors=None, **fields) -> dict[str, Path]:
    """Return the files with another language model: changed tensors, and changed fields of its config.json."""
    directory = shutil.copytree(files["llama"], tmp_path / "llama")
    held = load_file(directory / "model.safetensors") | (tensors or {})
    save_file(held, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))
    return files | {"llama": directory}


def changed(files: dict[str, Path], kind: str, tmp_path: Path, change) -> dict[str, Path]:
    tensors = load_file(files[kind])
    change(tensors)
    save_file(tensors, tmp_path / f"changed_{kind}.safetensors")
    return files | {kind: tmp_path / f"changed_{kind}.safetensors"}


# Rotary frequencies.

ROUNDED = {
    "float32": lambda x: x,
    "float16": lambda x: x.astype(np.float16),
    "bfloat16": lambda x: x.astype(ml_dtypes.bfloat16),
    "float16, widened": lambda x: x.astype(np.float16).astype(np.float32),
    "bfloat16, widened": lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32),
    "bfloat16, then float16": lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float16),
}


@pytest.mark.parametrize("rounded", ROUNDED)
@pytest.mark.parametrize("theta", [10000.0, 5e5])
def test_frequencies_in_any_precision_are_accepted(tiny_files, tmp_path, rounded, theta):
    cfg = dataclasses.replace(LLAMA, rope_theta=theta)
    stored = ROUNDED[rounded](rope_frequencies(cfg))
    files = changed_llama(tiny_files, tmp_path, {INV_FREQ.format(0): stored}, rope_theta=theta)
    assert any("rotary frequencies, equal to the computed" in reason for reason in plan(files).left_out)


@pytest.mark.parametrize("rounded", ["float32", "float16", "bfloat16", "bfloat16, widened"])
@pytest.mark.parametrize("theta", [10600.0, 9400.0, 1e6])
def test_frequencies_of_another_model_are_refused(tiny_files, tmp_path, rounded, theta):
    stored = ROUNDED[rounded](rope_frequencies(dataclasses.replace(LLAMA, rope_theta=theta)))
    reported = expect_refusal(changed_llama(tiny_files, tmp_path, {INV_FREQ.format(0): stored}), tmp_path)
    assert f"{INV_FREQ.format(0)} has other values than these files imply" in reported


@pytest.mark.parametrize("divisor", [1, 4])
def test_frequencies_of_linear_scaling_are_accepted_scaled_and_not(tiny_files, tmp_path, divisor):
    stored = rope_frequencies(LLAMA) / np.float32(divisor)
    scaling = {"type": "linear", "factor": 4.0}
    planned = plan(changed_llama(tiny_files, tmp_path, {INV_FREQ.format(1): stored}, rope_scaling=scaling))
    assert planned.config.llama.rope_scaling.factor == 4.0


def test_frequencies_of_another_linear_scaling_are_refused(tiny_files, tmp_path):
    files = changed_llama(
        tiny_files,
        tmp_path,
        {INV_FREQ.format(1): rope_frequencies(LLAMA) / np.float32(2)},
        rope_scaling={"type": "linear", "factor": 4.0},
    )
    assert "has other values than these files imply" in expect_refusal(files, tmp_path)


# Redundant weights are compared before they are dropped.


@pytest.mark.parametrize("same", [True, False])
def test_a_head_is_tied_only_where_it_is_the_embeddings(tmp_path, same, capsys):
    config = tiny(vocab_size=512)
    config = dataclasses.replace(config, llama=dataclasses.replace(config.llama, tie_embeddings=True))
    files = write_tiny(tmp_path / "files", config=config)
    embedding = load_file(files["llama"] / "model.safetensors")["model.embed_tokens.weight"]
    head = embedding if same else np.random.default_rng(0).standard_normal(embedding.shape, np.float32)
    files = changed_llama(files, tmp_path, {"lm_head.weight": head})
    main(convert_command(files, tmp_path / "model"))
    note = "ignored tie_word_embeddings of its config.json; lm_head.weight differs from the embeddings"
    assert (note in capsys.readouterr().out) != same
    assert open_model(tmp_path / "model").config.llama.tie_embeddings == same
    assert ("llama/head/kernel" in read_hashes(tmp_path / "model")) != same


def test_imagebind_weights_in_an_audio_checkpoint_are_compared(tiny_files, tmp_path):
    name = "modality_trunks.audio.blocks.0.norm_1.weight"
    held = load_file(tiny_files["imagebind"])[name]
    files = changed(tiny_files, "al", tmp_path, lambda t: t.update({f"audio_encoder.{name}": held}))
    assert any("equal to that of --imagebind" in reason for reason in plan(files).left_out)
    files = changed(tiny_files, "al", tmp_path, lambda t: t.update({f"audio_encoder.{name}": held + 1}))
    assert f"differs in {files['al']}: audio_encoder.{name} has other values" in expect_refusal(files, tmp_path)


def test_unknown_imagebind_weights_are_refused(tiny_files, tmp_path):
    files = changed(tiny_files, "al", tmp_path, lambda t: t.update({"audio_encoder.new.weight": np.ones(3)}))
    assert f"unexpected in {files['al']}: audio_encoder.new.weight [3]" in expect_refusal(files, tmp_path)


def test_frequencies_under_an_unknown_name_are_refused(tiny_files, tmp_path):
    name = "llama_model.other.rotary_emb.inv_freq"
    files = changed(tiny_files, "vl", tmp_path, lambda t: t.update({name: np.ones(8)}))
    assert f"unexpected in {files['vl']}: {name} [8]" in expect_refusal(files, tmp_path)


@pytest.mark.parametrize("same", [True, False])
def test_a_vision_branch_in_an_audio_checkpoint_is_compared_with_that_of_vl(tiny_files, tmp_path, same):
    bias = load_file(tiny_files["vl"])["llama_proj.bias"] + (not same)
    files = changed(tiny_files, "al", tmp_path, lambda t: t.update({"llama_proj.bias": bias}))
    if same:
        assert any("the vision branch, equal to that of --vl" in reason for reason in plan(files).left_out)
    else:
        assert f"differs in {files['al']}: llama_proj.bias has other values" in expect_refusal(files, tmp_path)


def test_weights_in_two_formats_are_reported(tiny_files, tmp_path):
    files = changed_llama(tiny_files, tmp_path)
    (files["llama"] / "pytorch_model.bin").write_bytes(b"anything")
    note = f"{files['llama']}/pytorch_model.bin: ignored, the weights are read from model.safetensors"
    assert note in plan(files).notes


# Wrappers.

WRAPPERS = {
    "module.": lambda name: f"module.{name}",
    "model.": lambda name: f"model.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
}


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("kind", ["vl", "blip2"])
def test_names_that_a_wrapper_prefixed(tiny_files, tiny_model, tmp_path, prefix, kind):
    tensors = {WRAPPERS[prefix](name): torch.from_numpy(t) for name, t in load_file(tiny_files[kind]).items()}
    torch.save({"model": tensors}, tmp_path / "file.pth")
    planned = plan(tiny_files | {kind: tmp_path / "file.pth"})
    assert len(planned.leaves) == len(plan(tiny_files).leaves)
    (note,) = [note for note in planned.notes if str(tmp_path / "file.pth") in note]
    assert all(part in note for part in prefix.replace(".", ". ").split())


def test_prefixed_names_of_a_wrapped_language_model_are_read(tiny_files, tiny_model, tmp_path):
    directory = shutil.copytree(tiny_files["llama"], tmp_path / "llama")
    tensors = load_file(directory / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
    vl.convert.convert(plan(tiny_files | {"llama": directory}), tmp_path / "model")
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)


def test_prefixed_names_of_a_compiled_submodule_are_read(tiny_files, tmp_path):
    def compile_module(tensors):
        for name in [name for name in tensors if name.startswith("video_Qformer.")]:
            tensors[name.replace("video_Qformer.", "video_Qformer._orig_mod.")] = tensors.pop(name)

    assert plan(changed(tiny_files, "vl", tmp_path, compile_module)).leaves


def test_a_deepspeed_checkpoint(tiny_files, tmp_path):
    tensors = {name: torch.from_numpy(tensor) for name, tensor in load_file(tiny_files["vl"]).items()}
    torch.save({"module": tensors, "global_steps": 5}, tmp_path / "states.pt")
    assert plan(tiny_files | {"vl": tmp_path / "states.pt"}).leaves


# Inconsistent torch files.


def saved(tiny_files, path: Path) -> Path:
    torch.save({name: torch.from_numpy(tensor) for name, tensor in load_file(tiny_files["vl"]).items()}, path)
    return path


def repacked(path: Path, out: Path, change=lambda name, data: data, method=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return out


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entries_are_refused(tiny_files, tmp_path, method):
    path = repacked(saved(tiny_files, tmp_path / "old.pth"), tmp_path / "file.pth", method=method)
    assert f"{path}: compressed or encrypted zip entries" in expect_one_line(tiny_files | {"vl": path}, tmp_path)


def test_stored_entries_without_alignment_are_read(tiny_files, tmp_path):
    path = repacked(saved(tiny_files, tmp_path / "old.pth"), tmp_path / "file.pth")
    vl.convert.convert(plan(tiny_files | {"vl": path}), tmp_path / "model")
    vl.convert.convert(plan(tiny_files), tmp_path / "expected")
    assert read_hashes(tmp_path / "model") == read_hashes(tmp_path / "expected")


def test_two_entries_of_one_name_are_refused(tiny_files, tmp_path):
    path = saved(tiny_files, tmp_path / "file.pth")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("file/data/0", b"other")
    assert "has duplicate zip entries" in expect_one_line(tiny_files | {"vl": path}, tmp_path)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HUGE = 2**36
CALLS = {
    "bytearray": lambda: Call(bytearray, HUGE),
    "torch.Tensor": lambda: Call(torch.Tensor, HUGE),
    "torch.nn.Parameter": lambda: Call(torch.nn.Parameter, HUGE),
    "quantized": lambda: Call(torch._utils._rebuild_qtensor, HUGE),
    "sparse": lambda: Call(torch._utils._rebuild_sparse_tensor, HUGE),
    "from numpy": lambda: Call(torch._utils._rebuild_device_tensor_from_numpy, HUGE),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("layout", ["zip", "old"])
def test_a_small_file_allocates_nothing_large(tiny_files, tmp_path, name, layout):
    path = tmp_path / "file.pth"
    torch.save({"video_query_tokens": CALLS[name]()}, path, _use_new_zipfile_serialization=layout == "zip")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert f"{path}: refused: its pickle refers to " in expect_one_line(tiny_files | {"vl": path}, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_tensor_beyond_its_storage(tiny_files, tmp_path):
    path = saved(tiny_files, tmp_path / "old.pth")

    def enlarge(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        at = data.index(b"K\x01K ")  # the shape [1, 32, 48]
        return data[: at + 3] + b"\xff" + data[at + 4 :]

    path = repacked(path, tmp_path / "file.pth", enlarge)
    assert f"{path}: " in expect_one_line(tiny_files | {"vl": path}, tmp_path)


def test_a_pickle_of_a_newer_protocol(tiny_files, tmp_path):
    (tmp_path / "file.pth").write_bytes(pickle.dumps({"a": Call(bytearray, HUGE)}, protocol=4))
    assert "refused: its pickle contains other objects than tensors" in expect_one_line(
        tiny_files | {"vl": tmp_path / "file.pth"}, tmp_path
    )


# Directories given for other options.


@pytest.mark.parametrize(
    "arguments", [["inspect"], ["verify"], ["export", "--out", "OUT"], ["quantize", "--out", "OUT"], ["chat", "CLIP"]]
)
@pytest.mark.parametrize("location", ["llama", "files", "above"])
def test_pytorch_weights_are_refused_as_a_model(tiny_files, clip, tmp_path, arguments, location):
    files = tiny_files["llama"].parent
    directory = {"llama": tiny_files["llama"], "files": files, "above": tmp_path / "above"}[location]
    if location == "above":
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        (directory / "weights").symlink_to(tiny_files["llama"])
    name, *more = [{"OUT": str(tmp_path / "out"), "CLIP": str(clip)}.get(part, part) for part in arguments]
    model_arguments = ["--model", str(directory)] if name == "chat" else [str(directory)]
    with pytest.raises(SystemExit) as stopped:
        main([name, *(more + model_arguments if name == "chat" else model_arguments + more)])
    assert stopped.value.code.startswith(f"vllama: {directory}: contains PyTorch weights (")
    assert stopped.value.code.endswith("); convert them with `vllama convert`")


def test_wrong_directories_for_the_language_model(tiny_files, tiny_model, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    files = {kind: path for kind, path in tiny_files.items() if kind != "llama"}
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "finetune.pth").write_bytes(b"")
    for number, (directory, message) in enumerate(
        {
            empty: "consolidated.00.pth; it is empty",
            weights: "consolidated.00.pth; it contains finetune.pth",
            tiny_model: "a model directory, not a Hugging Face LLaMA directory; give it as --base",
        }.items()
    ):
        (tmp_path / str(number)).mkdir()
        assert expect_one_line(files | {"llama": directory}, tmp_path / str(number)).endswith(message)
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "vicuna").symlink_to(tiny_files["llama"])
    (tmp_path / "x").mkdir()
    reported = expect_one_line(files | {"llama": tmp_path / "parent"}, tmp_path / "x")
    assert reported.endswith(f"did you mean {tmp_path}/parent/vicuna?")


def test_missing_torch_is_reported_only_for_existing_files(tiny_files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    reported = expect_one_line(tiny_files | {"vl": tmp_path / "absent.pth"}, tmp_path)
    assert reported == f"vllama: {tmp_path}/absent.pth: no such file; check the path"


def test_a_bfloat16_value_beyond_float16(tmp_path):
    files = write_tiny(tmp_path / "files", half=True)
    large = np.full(64, 1e30, ml_dtypes.bfloat16)
    files = changed_llama(files, tmp_path, {"model.norm.weight": large})
    reported = expect_one_line(files, tmp_path, "--dtype", "float16")
    assert reported.endswith("llama/norm/scale has values too large for float16; use bfloat16")


def test_commands_run_in_their_own_process(tiny_files, tmp_path):
    """Each prints one line on stderr and exits with code 1."""
    vllama = Path(sys.executable).with_name("vllama")
    done = subprocess.run([vllama, "inspect", tiny_files["llama"]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
