"""A directory of weight files, as released: each file is identified by its content, and the result is reported."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN_HEADS
from conversions import convert_command, drop_components, expect_one_line, plan, read_hashes
from safetensors.numpy import load_file, save_file
from written_weights import LFS, Hostile

from vllama_jax import convert
from vllama_jax.cli import main


@pytest.fixture
def release(tiny_files, tmp_path) -> Path:
    """The tiny files under uninformative names, in subfolders, with other files of a repository."""
    folder = tmp_path / "release"
    (folder / "deep" / "er").mkdir(parents=True)
    names = {"eva_vit": "a.pth", "blip2": "b.bin", "imagebind": "deep/c", "vl": "deep/er/d.ckpt", "al": "e.safetensors"}
    for kind, name in names.items():
        shutil.copyfile(tiny_files[kind], folder / name)
    shutil.copytree(tiny_files["llama"], folder / "chat-hf")
    (folder / "README.md").write_text("# weights")
    (folder / ".git").mkdir()
    shutil.copyfile(tiny_files["vl"], folder / ".git" / "object.pth")
    return folder


def config(tiny_files) -> tuple[str, str]:
    return "--config", str(tiny_files["config"])


def test_files_are_identified_by_content_and_reported(release, tiny_files, tiny_model, tmp_path, capsys):
    main(convert_command({}, tmp_path / "model", str(release), *config(tiny_files)))
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)
    assert capsys.readouterr().out.splitlines()[:7] == [
        f"{release}/a.pth: EVA-CLIP ViT-g weights, as --eva-vit",
        f"{release}/b.bin: BLIP-2 Q-Former weights, as --blip2",
        f"{release}/chat-hf: LLaMA weights, as --llama",
        f"{release}/deep/c: ImageBind weights, as --imagebind",
        f"{release}/deep/er/d.ckpt: a Video-LLaMA vision-language checkpoint, as --vl",
        f"{release}/e.safetensors: a Video-LLaMA audio-language checkpoint, as --al",
        f"{release}: ignored, not weights: README.md",
    ]


@pytest.mark.slow
def test_released_layout_with_eva_and_blip2_from_elsewhere(golden, golden_files, tmp_path):
    release = shutil.copytree(golden / "weights" / "videollama2_style", tmp_path / "Video-LLaMA-2-7B-Finetuned")
    shutil.copyfile(golden_files["imagebind"], release / "imagebind_huge.pth")
    (release / "llama-2-7b-chat-hf").symlink_to(golden / "weights" / "llama-st")
    elsewhere = {kind: golden_files[kind] for kind in ("eva_vit", "blip2")}
    options = {"config": GOLDEN_HEADS, "template": "llama_2"}
    result = convert.plan(directory=release, files=elsewhere, **options)
    convert.convert(result, tmp_path / "found")
    paths = {kind: release / f"{kind.upper()}_LLaMA_2_7B_Finetuned.pth" for kind in ("vl", "al")}
    paths |= elsewhere | {"imagebind": golden_files["imagebind"], "llama": golden / "weights" / "llama-st"}
    convert.convert(plan(paths, **options), tmp_path / "named")
    assert read_hashes(tmp_path / "found") == read_hashes(tmp_path / "named")


def test_options_have_priority_over_the_directory(release, tiny_files, tiny_model, tmp_path, capsys):
    (release / "d.pth").write_bytes((release / "deep/er/d.ckpt").read_bytes())  # of one component: the option decides
    shutil.copytree(release / "chat-hf", release / "other-hf")
    named = {kind: tiny_files[kind] for kind in ("vl", "llama")}
    main(convert_command(named, tmp_path / "model", str(release), *config(tiny_files)))
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)
    text = capsys.readouterr().out
    for name, option in {"d.pth": "vl", "deep/er/d.ckpt": "vl", "chat-hf": "llama", "other-hf": "llama"}.items():
        assert f"{release}/{name}: ignored, --{option} is given" in text


def test_one_file_of_both_branches_is_both(release, tiny_files, tiny_model, tmp_path):
    both = load_file(release / "e.safetensors") | load_file(release / "deep/er/d.ckpt")
    (release / "deep/er/d.ckpt").unlink()
    save_file(both, release / "e.safetensors")
    main(convert_command({}, tmp_path / "model", str(release), *config(tiny_files)))
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)


@pytest.mark.parametrize(
    ("name", "copy", "what", "option"),
    [
        ("a.pth", "z.pth", "EVA-CLIP ViT-g weights", "--eva-vit"),
        ("deep/er/d.ckpt", "z", "a Video-LLaMA vision-language checkpoint", "--vl"),
        ("chat-hf", "z-hf", "LLaMA weights", "--llama"),
    ],
)
def test_two_files_of_one_component_are_reported(release, tiny_files, tmp_path, name, copy, what, option):
    duplicate = shutil.copytree if (release / name).is_dir() else shutil.copyfile
    duplicate(release / name, release / copy)
    text = expect_one_line({}, tmp_path, str(release), *config(tiny_files))
    assert text == f"vllama: {release}/{name} and {release}/{copy}: both are {what}; choose one with {option}"


def test_one_file_under_two_names_and_links_in_a_circle(release, tiny_files, tiny_model, tmp_path):
    (release / "z.pth").symlink_to(release / "a.pth")
    (release / "deep" / "up").symlink_to(release)
    main(convert_command({}, tmp_path / "model", str(release), *config(tiny_files)))
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)


def test_directory_that_is_itself_the_language_models(release, tiny_files, tiny_model, tmp_path, capsys):
    for file in (release / "chat-hf").iterdir():
        file.rename(release / file.name)
    torch.save(load_file(release / "model.safetensors"), release / "pytorch_model.bin")  # in the other format
    main(convert_command({}, tmp_path / "model", str(release), *config(tiny_files)))
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)
    assert f"{release}: LLaMA weights, as --llama" in capsys.readouterr().out


def test_files_of_no_component_are_ignored_and_reported(release, tiny_files, tiny_model, tmp_path, capsys):
    (release / "bert").mkdir()
    (release / "bert" / "config.json").write_text('{"model_type": "bert"}')
    save_file({"bert.embeddings": np.ones(3)}, release / "bert" / "model.safetensors")
    shutil.copyfile(tiny_files["llama"] / "model.safetensors", release / "llama.safetensors")
    (release / "archive.zip").write_bytes(b"PK\x03\x04 an archive")
    (release / ".gitattributes").write_text("")
    shutil.copytree(tiny_model, release / "made before")
    for number in range(6):
        (release / f"picture{number}.png").write_bytes(b"\x89PNG")
    main(convert_command({}, tmp_path / "model", str(release), *config(tiny_files)))
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)
    text = capsys.readouterr().out
    assert f"{release}/bert/model.safetensors: ignored, weights of an unknown type" in text
    assert f"{release}/llama.safetensors: ignored, LLaMA weights without config.json" in text
    assert f"{release}: ignored, not weights: README.md, archive.zip, bert/config.json, made before, " in text
    assert "picture0.png and 5 more\n" in text


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.bin", "x.ckpt", "x.safetensors"])
@pytest.mark.parametrize(
    ("data", "message"),
    [(LFS, "a git-lfs pointer"), (b"", "the file is empty"), (b"PK\x03\x04 half a download", "corrupt")],
)
def test_files_named_like_weights_without_weights_are_refused(release, tiny_files, tmp_path, name, data, message):
    (release / "deep" / name).write_bytes(data)
    text = expect_one_line({}, tmp_path, str(release), *config(tiny_files))
    assert text.startswith(f"vllama: {release}/deep/{name}: ")
    assert message in text
    assert text.endswith("; if the model does not need this file, move it elsewhere")


@pytest.mark.parametrize("name", ["hostile.pth", "hostile"])
def test_hostile_pickle_in_a_directory_is_not_run(release, tiny_files, tiny_model, tmp_path, name):
    marker = tmp_path / "marker"
    torch.save({"model": {"video_query_tokens": Hostile(marker)}}, release / name)
    if name.endswith(".pth"):
        text = expect_one_line({}, tmp_path, str(release), *config(tiny_files))
        assert f"{release}/hostile.pth: refused: its pickle refers to {os.system.__module__}.system" in text
    else:
        main(convert_command({}, tmp_path / "model", str(release), *config(tiny_files)))
        assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("missing", "said_missing"),
    [(["a.pth"], "--eva-vit"), (["a.pth", "b.bin", "chat-hf"], "--llama, --eva-vit, --blip2")],
)
def test_missing_components_are_listed(release, tiny_files, tmp_path, missing, said_missing):
    for name in missing:
        (release / name).rename(tmp_path / name)
    text = expect_one_line({}, tmp_path, str(release), *config(tiny_files))
    assert text == f"vllama: every model needs {said_missing}; {release} contains none"


def test_required_files_are_listed(tiny_files, tmp_path):
    assert expect_one_line({}, tmp_path) == "vllama: every model needs --llama, --eva-vit, --blip2"
    (tmp_path / "out").rmdir()
    assert expect_one_line(drop_components(tiny_files, "blip2"), tmp_path) == "vllama: every model needs --blip2"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("absent", "no such file or directory; give a weight file or a directory of them"),
        ("README.md", "not a directory; give the directory of the weight files"),
    ],
)
def test_other_paths_than_directories_are_refused(release, tmp_path, name, what):
    assert expect_one_line({}, tmp_path, str(release / name)) == f"vllama: {release}/{name}: {what}"


def test_an_unreadable_folder_is_reported(release, tmp_path, monkeypatch):
    def forbid(self, iterdir=Path.iterdir):
        if self.name == "er":
            raise PermissionError(13, "Permission denied")
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", forbid)
    text = expect_one_line({}, tmp_path, str(release))
    assert text == f"vllama: {release}/deep/er: cannot be read (Permission denied); check its permissions"
