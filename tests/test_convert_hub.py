"""Repositories on the hub are read from the cache that huggingface_hub keeps; no test here goes online."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from conversions import command, hashes, one_line, without
from huggingface_hub import constants, errors
from safetensors.numpy import load_file, save_file

from vllama_jax.cli import main
from vllama_jax.convert import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def put(cache: Path, repository: str, files: dict[str, Path], revision: str = "main") -> None:
    """A repository as huggingface_hub keeps it: files by their hash, and links of their names to them."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / revision).write_text(COMMIT)
    for number, (name, file) in enumerate(files.items()):
        blob = home / "blobs" / f"{number:064x}"
        shutil.copyfile(file, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)


def llama_files(tiny_files, prefix: str = "") -> dict[str, Path]:
    return {f"{prefix}{file.name}": file for file in tiny_files["llama"].iterdir()}


def test_language_model_and_files_from_the_cache(tiny_files, tiny_model, tmp_path, cache):
    put(cache, "someone/llama", llama_files(tiny_files))
    put(cache, "DAMO/series", {"deep/vl.pth": tiny_files["vl"]}, revision="v2")
    paths = tiny_files | {"llama": "hf://someone/llama", "vl": "hf://DAMO/series@v2/deep/vl.pth"}
    main(command(paths, tmp_path / "model"))
    assert hashes(tmp_path / "model") == hashes(tiny_model)
    assert not any(file.is_symlink() for file in (tmp_path / "model").rglob("*"))


def test_a_release_from_the_cache(tiny_files, tiny_model, tmp_path, cache, capsys):
    names = {f"{kind}.pth": tiny_files[kind] for kind in ("imagebind", "vl", "al")}
    put(cache, "DAMO/release", names | llama_files(tiny_files, "llama-2-7b-chat-hf/"))
    beside = {kind: tiny_files[kind] for kind in ("eva_vit", "blip2", "config")}
    main(command(beside, tmp_path / "model", "hf://DAMO/release"))
    assert hashes(tmp_path / "model") == hashes(tiny_model)
    assert "llama-2-7b-chat-hf: LLaMA weights, as --llama" in capsys.readouterr().out


def test_a_delta_from_the_cache(tiny_files, tiny_model, tmp_path, cache):
    tensors = load_file(tiny_files["llama"] / "model.safetensors")
    save_file({name: np.zeros_like(tensor) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    files = llama_files(tiny_files) | {"model.safetensors": tmp_path / "model.safetensors"}
    put(cache, "lmsys/delta", files)
    main(command(tiny_files | {"delta": "hf://lmsys/delta"}, tmp_path / "model"))
    assert hashes(tmp_path / "model") == hashes(tiny_model)


def test_only_needed_files_are_downloaded(tmp_path, monkeypatch):
    asked = []

    def download(repository, revision, allow_patterns, ignore_patterns):
        asked.append((allow_patterns, ignore_patterns))
        (tmp_path / "part").mkdir(exist_ok=True)
        (tmp_path / "part" / "model.safetensors.index.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve_hub_path("hf://a/b") == tmp_path
    assert asked == [
        (["*.json", "*.model"], ["original/*"]),
        (["*.json", "*.model", *hub.WEIGHT_PATTERNS], ["original/*", "part/pytorch_model*.bin"]),
    ]


def test_uncached_repositories_are_a_one_line_error(tiny_files, tmp_path, cache):
    said = one_line(tiny_files | {"llama": "hf://someone/llama"}, tmp_path)
    assert said == (
        "vllama: hf://someone/llama: not (all) in the cache, and the hub cannot be reached; "
        "go online once (HF_HUB_OFFLINE unset)"
    )


def test_a_file_and_a_shard_that_are_not_cached(tiny_files, tmp_path, cache):
    put(cache, "someone/vl", {"vl.pth": tiny_files["vl"]})
    assert one_line(tiny_files | {"vl": "hf://someone/vl/al.pth"}, tmp_path) == (
        "vllama: hf://someone/vl: has no file al.pth"
    )
    (tmp_path / "out").rmdir()
    index = tmp_path / "model.safetensors.index.json"
    names = list(load_file(tiny_files["llama"] / "model.safetensors"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    files = without(llama_files(tiny_files), "model.safetensors")
    put(cache, "someone/llama", files | {"model.safetensors.index.json": index})
    said = one_line(tiny_files | {"llama": "hf://someone/llama"}, tmp_path)
    assert said.endswith("/model-00001-of-00001.safetensors: no such file; check the path")


@pytest.mark.parametrize("address", ["hf://alone", "hf://a", "hf://a@b"])
def test_invalid_hub_addresses_are_refused(tiny_files, tmp_path, cache, address):
    said = one_line(tiny_files | {"llama": address}, tmp_path)
    assert said.startswith(f"vllama: {address}: not an address on the hub; name it as hf://org/name or ")


class Response:
    """As much of one as the errors of huggingface_hub look at."""

    def __init__(self):
        self.headers, self.status_code, self.text, self.request = {}, 403, "", None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("x", response=Response()), "its owner asks to accept a licence first"),
        (errors.RepositoryNotFoundError("x", response=Response()), "no such repository, or a private one"),
        (errors.RevisionNotFoundError("x", response=Response()), "no such revision"),
        (errors.HFValidationError("bad\nname"), "cannot be downloaded (bad name)"),
        (OSError("disk full"), "cannot be downloaded (disk full)"),
    ],
)
def test_hub_errors_are_one_line(tiny_files, tmp_path, monkeypatch, error, message):
    def refuse(*_: object, **__: object):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert f"vllama: hf://a/b: {message}" in one_line(tiny_files | {"llama": "hf://a/b"}, tmp_path)


def test_without_huggingface_hub_the_error_says_what_to_install(tiny_files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = one_line(tiny_files | {"llama": "hf://a/b"}, tmp_path)
    needs = "reading from the hub needs huggingface_hub, which is not installed"
    assert f"hf://a/b: {needs}: pip install 'vllama-jax[convert]'; or download it yourself" in said
