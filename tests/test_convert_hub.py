"""Repositories on the hub are read from huggingface_hub's cache; no test here goes online."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from conversions import convert_command, drop_components, expect_one_line, read_hashes
from huggingface_hub import constants, errors
from safetensors.numpy import load_file, save_file

from vllama_jax.cli import main
from vllama_jax.io import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def put(cache: Path, repository: str, files: dict[str, Path], revision: str = "main") -> None:
    """Write a repository as huggingface_hub caches it: files named by their hash, with links from their names."""
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
    main(convert_command(paths, tmp_path / "model"))
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)
    assert not any(file.is_symlink() for file in (tmp_path / "model").rglob("*"))


def test_a_release_from_the_cache(tiny_files, tiny_model, tmp_path, cache, capsys):
    names = {f"{kind}.pth": tiny_files[kind] for kind in ("imagebind", "vl", "al")}
    put(cache, "DAMO/release", names | llama_files(tiny_files, "llama-2-7b-chat-hf/"))
    beside = {kind: tiny_files[kind] for kind in ("eva_vit", "blip2", "config")}
    main(convert_command(beside, tmp_path / "model", "hf://DAMO/release"))
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)
    assert "llama-2-7b-chat-hf: LLaMA weights, as --llama" in capsys.readouterr().out


def test_a_delta_from_the_cache(tiny_files, tiny_model, tmp_path, cache):
    tensors = load_file(tiny_files["llama"] / "model.safetensors")
    save_file({name: np.zeros_like(tensor) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    files = llama_files(tiny_files) | {"model.safetensors": tmp_path / "model.safetensors"}
    put(cache, "lmsys/delta", files)
    main(convert_command(tiny_files | {"delta": "hf://lmsys/delta"}, tmp_path / "model"))
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)


def test_only_needed_files_are_downloaded(tmp_path, monkeypatch):
    patterns = []

    def download(repository, revision, allow_patterns, ignore_patterns):
        patterns.append((allow_patterns, ignore_patterns))
        (tmp_path / "part").mkdir(exist_ok=True)
        (tmp_path / "part" / "model.safetensors.index.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve_hub_path("hf://a/b") == tmp_path
    assert patterns == [
        (["*.json", "*.model"], ["original/*"]),
        (["*.json", "*.model", *hub.WEIGHT_PATTERNS], ["original/*", "part/pytorch_model*.bin"]),
    ]


def test_uncached_repositories_are_a_one_line_error(tiny_files, tmp_path, cache):
    text = expect_one_line(tiny_files | {"llama": "hf://someone/llama"}, tmp_path)
    assert text == (
        "vllama: hf://someone/llama: not completely cached, and the hub cannot be reached; "
        "go online and unset HF_HUB_OFFLINE"
    )


def test_a_file_and_a_shard_that_are_not_cached(tiny_files, tmp_path, cache):
    put(cache, "someone/vl", {"vl.pth": tiny_files["vl"]})
    assert expect_one_line(tiny_files | {"vl": "hf://someone/vl/al.pth"}, tmp_path) == (
        "vllama: hf://someone/vl: file al.pth not found"
    )
    (tmp_path / "out").rmdir()
    index = tmp_path / "model.safetensors.index.json"
    names = list(load_file(tiny_files["llama"] / "model.safetensors"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    files = drop_components(llama_files(tiny_files), "model.safetensors")
    put(cache, "someone/llama", files | {"model.safetensors.index.json": index})
    text = expect_one_line(tiny_files | {"llama": "hf://someone/llama"}, tmp_path)
    assert text.endswith("/model-00001-of-00001.safetensors: no such file; check the path")


@pytest.mark.parametrize("address", ["hf://alone", "hf://a", "hf://a@b"])
def test_invalid_hub_addresses_are_refused(tiny_files, tmp_path, cache, address):
    text = expect_one_line(tiny_files | {"llama": address}, tmp_path)
    assert text.startswith(f"vllama: {address}: not an address on the hub; write hf://org/name or ")


class Response:
    """The attributes of a response that huggingface_hub's errors read."""

    def __init__(self):
        self.headers, self.status_code, self.text, self.request = {}, 403, "", None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("x", response=Response()), "gated repository; accept its license on its page"),
        (errors.RepositoryNotFoundError("x", response=Response()), "repository not found, or private"),
        (errors.RevisionNotFoundError("x", response=Response()), "revision not found"),
        (errors.HFValidationError("bad\nname"), "cannot be downloaded (bad name)"),
        (OSError("disk full"), "cannot be downloaded (disk full)"),
    ],
)
def test_hub_errors_are_one_line(tiny_files, tmp_path, monkeypatch, error, message):
    def refuse(*_: object, **__: object):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert f"vllama: hf://a/b: {message}" in expect_one_line(tiny_files | {"llama": "hf://a/b"}, tmp_path)
