"""Errors of `vllama convert` for tensors, options and disks, and the files that a killed conversion leaves."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conversions import convert_command, drop_components, expect_one_line, expect_refusal, plan, read_hashes
from safetensors.numpy import load_file, save_file

import vllama_jax as vl
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli import main
from vllama_jax.convert.weight_files import SafetensorsFile

FREQUENCIES = 10000.0 ** -(np.arange(0, 16, 2) / 16)
POSITION_IDS = "video_Qformer.bert.embeddings.position_ids"
VL_FREQUENCIES = "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq"
AL_SCALE = "audio_encoder.modality_postprocessors.audio.1.log_logit_scale"


# Tensors that do not make a model.


def resaved(path: Path, tmp_path: Path, change) -> Path:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, tmp_path / path.name)
    return tmp_path / path.name


def test_all_mismatches_are_listed_at_once(tiny_files, tmp_path):
    def spoil_vl(tensors):
        del tensors["llama_proj.bias"]
        tensors["video_frame_position_embedding.weight"] = np.ones((32, 47), np.float32)
        tensors["something.else"] = np.ones(2, np.float32)

    def spoil_vit(tensors):
        tensors["blocks.1.norm1.weight"] = np.ones(64, np.int64)

    vl_file, vit = resaved(tiny_files["vl"], tmp_path, spoil_vl), resaved(tiny_files["eva_vit"], tmp_path, spoil_vit)
    llama = shutil.copytree(tiny_files["llama"], tmp_path / "llama")
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    save_file(tensors, llama / "model-1.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, llama / "model-2.safetensors")
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    reported = expect_refusal(tiny_files | {"vl": vl_file, "eva_vit": vit, "llama": llama}, tmp_path)
    assert sorted(reported.splitlines()) == sorted(
        [
            "vllama: the files do not make a model:",
            f"  wrong dtype in {vit}: blocks.1.norm1.weight is int64, not float64, float32, bfloat16, float16",
            f"  shape mismatch in {vl_file}: video_frame_position_embedding.weight is [32, 47], but [32, 48] is needed",
            f"  missing in {vl_file}: llama_proj.bias [64]",
            f"  duplicate in {llama}: model.norm.weight",
            f"  unexpected in {vl_file}: something.else [2]",
        ]
    )


def test_hundreds_of_wrong_tensors_are_counted(tiny_files, tmp_path):
    def rename(tensors):
        for name in [name for name in tensors if (".norm" in name or ".mlp" in name) and "blocks.3" not in name]:
            tensors[f"other.{name}"] = tensors.pop(name)
        tensors["blocks.0.mlp.fc1.weight"] = tensors["other.blocks.0.mlp.fc1.weight"]

    reported = expect_refusal(tiny_files | {"eva_vit": resaved(tiny_files["eva_vit"], tmp_path, rename)}, tmp_path)
    lines = reported.splitlines()
    assert len(lines) == 31
    assert (lines[1][:13], lines[15]) == ("  missing in ", "  … and 9 more missing in")
    assert (lines[16][:16], lines[30]) == ("  unexpected in ", "  … and 10 more unexpected in")


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("eva_vit", "pos_embed", None, "incomplete, pos_embed is missing"),
        ("eva_vit", "patch_embed.proj.weight", np.ones((64, 588)), "[64, 588], but 4 axes are expected"),
        ("eva_vit", "patch_embed.proj.weight", np.ones((64, 3, 0, 0)), "[64, 3, 0, 0], but 4 axes are expected"),
        ("blip2", "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight", None, "incomplete, Qformer.bert."),
        ("imagebind", "modality_heads.audio.2.weight", None, "incomplete, modality_heads.audio.2.weight is missing"),
        ("al", "audio_position_embedding.weight", None, "incomplete, audio_position_embedding.weight is missing"),
        ("imagebind", AL_SCALE.removeprefix("audio_encoder."), np.ones(2), "log_logit_scale is not a single number"),
    ],
)
def test_a_missing_or_misshapen_tensor_that_determines_a_dimension_is_reported(
    tiny_files, tmp_path, kind, name, value, message
):
    def change(tensors):
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    assert message in expect_one_line(tiny_files | {kind: resaved(tiny_files[kind], tmp_path, change)}, tmp_path)


@pytest.mark.parametrize(
    ("kind", "name", "right", "wrong"),
    [
        ("vl", POSITION_IDS, np.arange(512)[None], np.arange(1, 513)[None]),
        ("vl", VL_FREQUENCIES, FREQUENCIES.astype(np.float16), FREQUENCIES / 2),
        ("vl", VL_FREQUENCIES, FREQUENCIES, FREQUENCIES[:4]),
        ("al", AL_SCALE, np.array(np.log(20), np.float32), np.ones((), np.float32)),
    ],
)
def test_stored_buffers_are_compared_with_computed_ones(tiny_files, tmp_path, kind, name, right, wrong):
    path = resaved(tiny_files[kind], tmp_path, lambda tensors: tensors.update({name: right}))
    assert any(reason.startswith(f"{path}: a buffer") for reason in plan(tiny_files | {kind: path}).left_out)
    path = resaved(tiny_files[kind], tmp_path, lambda tensors: tensors.update({name: wrong}))
    assert f"differs in {path}: {name} has other values than these files imply" in expect_refusal(
        tiny_files | {kind: path}, tmp_path
    )


# --config.

BAD_CONFIGS = {
    "unknown field": ('{"colour": 1}', "--config: unknown field colour; known fields: audio_qformer, "),
    "unknown field inside": ('{"vit": {"heads": 4}}', "--config.vit: unknown field heads; known fields: depth, "),
    "object expected": ('{"vit": 4}', "--config.vit: 4 is not an object"),
    "object expected inside": ('{"imagebind": {"audio": [1]}}', "--config.imagebind.audio: [1] is not an object"),
    "null part": ('{"llama": null}', "--config.llama: None is not an object"),
    "text for a number": ('{"vit": {"depth": "3"}}', "vit.depth: '3' is not of type int"),
    "zero": ('{"vit": {"num_heads": 0}}', "--config.vit.num_heads must be above 0, not 0"),
    "heads that do not divide": ('{"vit": {"num_heads": 5}}', "vit: width 64 is not a multiple of num_heads 5"),
    "more layers than there are": (
        '{"vit": {"num_heads": 4, "depth": 9}}',
        "has 4 layers, but vit.depth is 9; set --config",
    ),
    "unknown template": ('{"template": "x"}', "unknown prompt template 'x'"),
    "broken JSON": ('{"vit": ', "config.json: not JSON"),
    "no object": ("[1]", "config.json: must contain a JSON object, not list"),
    "no text": ("\udcff\udcfe", "config.json: cannot be read"),
}


@pytest.mark.parametrize("config", BAD_CONFIGS)
def test_a_bad_config_is_one_line(tiny_files, tmp_path, config):
    text, message = BAD_CONFIGS[config]
    config_fields = json.loads(tiny_files["config"].read_text())
    if text.startswith("{") and text.endswith("}"):
        fields = json.loads(text)
        merged = config_fields | {
            name: config_fields[name] | part if name == "vit" and type(part) is dict else part
            for name, part in fields.items()
        }
        text = json.dumps(merged)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert message in expect_one_line(tiny_files | {"config": tmp_path / "config.json"}, tmp_path)


def test_a_missing_config_is_reported(tiny_files, tmp_path):
    reported = expect_one_line(tiny_files | {"config": tmp_path / "absent.json"}, tmp_path)
    assert f"{tmp_path}/absent.json: cannot be read" in reported


def test_head_counts_that_cannot_be_inferred_are_listed(tiny_files, tmp_path):
    reported = expect_one_line(drop_components(tiny_files, "config"), tmp_path)
    assert "of vit, image_qformer, video_qformer, audio_qformer, imagebind.audio, imagebind.vision, " in reported
    assert 'give a --config file with, for example, {"vit": {"num_heads": 4}}' in reported


# Output.


def test_an_existing_output_is_kept(tiny_files, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("mine")
    with pytest.raises(SystemExit, match=f"{tmp_path}/model: already exists; remove it or choose another path"):
        main(convert_command(tiny_files, tmp_path / "model"))
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine"]


def test_out_below_a_file_is_one_line(tiny_files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        SystemExit, match=r"file/model: cannot be written \(Not a directory\); no partial output remains"
    ):
        main(convert_command(tiny_files, tmp_path / "file" / "model"))


def test_an_unwritable_output_is_a_one_line_error(tiny_files, tmp_path, monkeypatch):
    def forbid(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "mkdir", forbid)
    with pytest.raises(SystemExit, match=r"model: cannot be written \(Permission denied\); no partial output remains"):
        main(convert_command(tiny_files, tmp_path / "model"))


def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_files, tmp_path, monkeypatch):
    written = []

    def full(handle: int) -> None:
        written.append(handle)
        if len(written) > 50:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    reported = expect_one_line(tiny_files, tmp_path)
    assert (
        reported
        == f"vllama: {tmp_path}/out/model: cannot be written (No space left on device); no partial output remains"
    )


def test_values_that_overflow_a_dtype_are_refused(tiny_files, tmp_path):
    def enlarge(tensors):
        tensors["blocks.1.norm1.weight"][5] = 70000

    path = resaved(tiny_files["eva_vit"], tmp_path, enlarge)
    reported = expect_one_line(tiny_files | {"eva_vit": path}, tmp_path, "--dtype", "float16")
    assert reported == f"vllama: {path}: vit/blocks/norm1/scale has values too large for float16; use bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, 5000), "was truncated while it was read"),
        (os.unlink, r"cannot be read \(No such file or directory\)"),
    ],
)
def test_source_that_changes_while_it_is_read(tiny_files, tmp_path, change, message):
    path = Path(shutil.copy(tiny_files["vl"], tmp_path / "vl.safetensors"))
    made = plan(tiny_files | {"vl": path})
    change(path)
    with pytest.raises(vl.CheckpointError, match=f"{path}: {message}"):
        vl.convert.convert(made, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Separate processes.

MAIN = "from vllama_jax.cli import main; main()"
KILLED = """
import itertools, os, signal, sys
from vllama_jax.cli import main

def killing(act, moments, moment):
    def acted(*arguments, **options):
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*arguments, **options)
    return acted

outs, arguments = sys.argv[1].split(","), sys.argv[2:]
for out in outs:
    if not os.fork():
        moments, moment = itertools.count(), int(out.rsplit("_", 1)[1])
        for name in ("fsync", "mkdir", "rename", "open", "rmdir"):
            setattr(os, name, killing(getattr(os, name), moments, moment))
        main([*arguments, "--out", out])
        with open(f"{out}.moments", "w") as file:
            file.write(str(next(moments)))
        os._exit(0)
    os.wait()
"""


def run(program: str, arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_error_is_one_line_on_stderr_and_exit_code_1(tiny_files, tmp_path):
    ended = run(MAIN, convert_command(tiny_files | {"vl": tmp_path / "absent.pth"}, tmp_path / "model"))
    assert (ended.stdout, ended.stderr) == ("", f"vllama: {tmp_path}/absent.pth: no such file; check the path\n")
    assert ended.returncode == 1


def kill_times(arguments: list[str], tmp_path: Path, times: list[int]) -> list[Path]:
    """Return the system calls at which conversions were killed, a different one for each."""
    outs = [tmp_path / f"model_{moment}" for moment in times]
    assert run(KILLED, [",".join(map(str, outs)), *arguments]).returncode == 0
    return outs


@pytest.mark.slow
@pytest.mark.parametrize("base", [False, True])
def test_a_killed_conversion_leaves_no_complete_output_and_can_be_rerun(tiny_files, tiny_model, tmp_path, base):
    arguments = ["convert", *convert_command(tiny_files, tmp_path)[1:-2]]
    if base:
        arguments = ["convert", "--vl", str(tiny_files["vl"]), "--base", str(tiny_model)]
    (finished,) = kill_times(arguments, tmp_path, [10**9])
    last = int(Path(f"{finished}.moments").read_text())
    assert last > 400
    killed = kill_times(arguments, tmp_path, [0, 1, 2, 5, 100, last // 2, last - 4, last - 3, last - 2, last - 1])
    left = {path.name for path in tmp_path.iterdir()}
    assert sum(f".{out.name}.partial" in left for out in killed) >= 6
    for out in killed:
        partial = out.with_name(f".{out.name}.partial")
        for found in (path for path in (out, partial) if is_complete(path)):
            assert read_hashes(found) == read_hashes(finished) == read_hashes(tiny_model)
            vl.load(found)
        if not out.exists():
            main([*arguments, "--out", str(out)])
            assert read_hashes(out) == read_hashes(tiny_model)
        assert not partial.exists()


def is_complete(model: Path) -> bool:
    try:
        return bool(open_model(model))
    except vl.CheckpointError:
        return False


def test_no_weight_is_read_twice(tiny_files, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        SafetensorsFile,
        "read",
        lambda self, name, old=SafetensorsFile.read: read.append((self, name)) or old(self, name),
    )
    save_file(load_file(tiny_files["vl"]) | load_file(tiny_files["al"]), tmp_path / "both.safetensors")
    both = dict.fromkeys(("vl", "al"), tmp_path / "both.safetensors")
    main(convert_command(tiny_files | both, tmp_path / "model"))
    weights = [what for what in read if not what[1].endswith("log_logit_scale")]  # a single number, compared too
    assert len(weights) == len(set(weights)) > 300
