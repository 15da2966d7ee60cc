"""`vllama push`, and hf:// names as models, against a local server with the hub's API."""

import dataclasses
import http.server
import json
import shutil
import sys
import threading
from pathlib import Path

import pytest
import yaml
from cli_fixtures import expect_error, expect_error_line, expect_usage_error, run_vllama
from conversions import plan, read_hashes
from hub_double import TOKEN, Hub, run_hub
from huggingface_hub import constants

from vllama_jax import convert
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli import main
from vllama_jax.convert import export
from vllama_jax.convert.components import FILE_SPECS
from vllama_jax.errors import CheckpointError

NAME = "DAMO-NLP-SG/Video-LLaMA-2-7B-Finetuned"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without repositories, for this process and the commands that it starts, with empty caches."""
    with run_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        settings = {"ENDPOINT": served.url, "HUB_CACHE": str(tmp_path / "hub"), "HUB_DISABLE_XET": "1", "TOKEN": TOKEN}
        for name, value in settings.items():
            monkeypatch.setenv(f"HF_{name}", value)
        monkeypatch.setenv("VLLAMA_CACHE", str(tmp_path / "cache"))
        yield served


def read_files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_pushed_model_is_loaded_by_its_name(hub: Hub, tiny_model, tmp_path, monkeypatch, capsys):
    report = tmp_path / "report.json"
    logits = {"positions": 100, "mean_kl": 1e-9, "max_kl": 1e-8, "top1": 1.0}
    layers = [{"component": "llama", "layer": "layer 0", "maximum": 1e-5, "relative": 2e-6}]
    bounds = {"relative": 1e-4, "mean_kl": 1e-6, "top1": 0.999}
    fields = {"layers": layers, "logits": logits, "bounds": bounds, "failures": [], "equal": True, "quantized": None}
    report.write_text(json.dumps({**fields, "digest": open_model(tiny_model).digest}))
    main(["push", str(tiny_model), "me/tiny", "--verify", str(report)])
    printed = capsys.readouterr()
    (commit, files) = hub.files("me/tiny")
    assert printed.out.startswith(f"{hub.url}/me/tiny: ")
    assert printed.out.endswith(f"commit {commit}; the model is hf://me/tiny\n")
    assert printed.err.count("\n") == 1
    assert {name: data for name, data in files.items() if name[0] not in ".R"} == read_files(tiny_model)
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["library_name"]) == ("other", "vllama-jax")
    for line in (
        "| llama | 2.0e-06 |",
        "the same most likely token at 100.00% of positions",
        "| `imagebind` | ImageBind: CC BY-NC-SA 4.0, for non-commercial use only |",
        'vl.load("hf://me/tiny")',
    ):
        assert line in card
    assert all(f"`{name}`" in card for name in ("eva_vit_g.safetensors", "vl.safetensors"))

    assert open_model("hf://me/tiny").digest == open_model(tiny_model).digest
    assert open_model(f"hf://me/tiny@{commit}").path == open_model("hf://me/tiny").path
    assert capsys.readouterr().err == ""  # messages are log records, which commands print
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_model("hf://me/tiny").digest == open_model(tiny_model).digest


def test_a_second_push_replaces_the_model_in_one_commit(hub: Hub, tiny_model, tmp_path):
    hub.commit("me/tiny", {"params/stale/0": b"x", "params/llama.norm.scale/0": b"y", "notes.txt": b"mine"})
    main(["push", str(tiny_model), "hf://me/tiny", "--message", "again"])
    files = hub.files("me/tiny")[1]
    assert len(hub.commits["me/tiny"]) == 2
    assert files.keys() - read_files(tiny_model).keys() == {"README.md", "notes.txt"}


def test_a_dry_run_uploads_nothing(hub: Hub, tiny_model, capsys):
    main(["push", str(tiny_model), "me/tiny", "--dry-run", "--license", "apache-2.0"])
    printed = capsys.readouterr().out
    assert f"{(tiny_model / 'config.json').stat().st_size:,} config.json" in printed
    assert "license: apache-2.0" in printed
    assert hub.requests == []


def test_what_cannot_be_pushed_is_a_one_line_error(hub: Hub, tiny_model, tmp_path, monkeypatch, capsys):
    message = expect_error(capsys, "push", tiny_model, "tiny")
    assert message == "vllama: tiny: not the name of a repository on the hub; write OWNER/NAME, without a revision"
    assert "no config.json in it" in expect_error(capsys, "push", tmp_path, "me/tiny")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "params/llama.norm.scale/0").write_bytes(bytes(256))
    assert "broken: 1 array corrupt, such as llama/norm/scale" in expect_error(capsys, "push", broken, "me/tiny")
    for fields, problem in (
        ({"weights": 1}, "not a report of a comparison"),
        ({"logits": {}, "equal": True, "digest": "0"}, "a report about another model"),
        ({"components": [], "equal": False, "digest": open_model(tiny_model).digest}, "the report shows differences"),
    ):
        (tmp_path / "report.json").write_text(json.dumps(fields))
        assert problem in expect_error(capsys, "push", tiny_model, "me/tiny", "--verify", tmp_path / "report.json")
    usage = expect_usage_error("push", tiny_model, "me/tiny", "--card", "card.md", "--license", "mit")
    assert usage.startswith("--card is uploaded as it is")
    assert hub.commits == {}
    hub.commit("me/public", {})
    assert "hf://me/public: exists and is public" in expect_error_line("push", tiny_model, "me/public", "--private")
    monkeypatch.setenv("HF_TOKEN", "")
    assert expect_error_line("push", tiny_model, "me/public").startswith("hf://me/public: access denied; run `hf auth")
    assert len(hub.commits["me/public"]) == 1


@pytest.mark.slow
def test_a_run_is_merged_before_it_is_pushed(hub: Hub, stage1, capsys):
    message = expect_error(capsys, "push", stage1, "me/run")
    base = json.loads((stage1 / "config.json").read_text())["base"]["path"]
    assert f"merge it with its base model first: vllama convert --base {base} --vl {stage1} --out MODEL" in message


def test_repositories_without_a_model_are_a_one_line_error(hub: Hub, tiny_files, monkeypatch, capsys):
    hub.commit("me/empty", {"README.md": b"# nothing"})
    hub.commit("me/llama", read_files(tiny_files["llama"]))
    hub.commit("me/secret", {"manifest.json": b"{}"})
    hub.private.add("me/secret")
    monkeypatch.setenv("HF_TOKEN", "")
    for name, problem in (
        ("me/empty", "no model in this repository (no manifest.json, and no weight files)"),
        ("me/llama", "weights of a language model at most, without vision and audio branches; pass it to `vllama con"),
        ("me/llama@v9", "revision not found"),
        ("me/none", "repository not found, or private; check its name, or run `hf auth login`"),
        ("me/secret", "repository not found, or private; check its name, or run `hf auth login`"),
        ("me/llama/config.json", "a file; a model is a whole repository, hf://me/llama"),
    ):
        message = expect_error(capsys, "inspect", f"hf://{name}")
        assert message.startswith(f"vllama: hf://{name.partition('@')[0]}")
        assert problem in message
    hub.commit("me/original", {"vl.pth": b"", "llama/model.safetensors": b""})
    monkeypatch.setitem(sys.modules, "torch", None)
    message = expect_error(capsys, "inspect", "hf://me/original")
    assert message.endswith("needs torch, which is not installed: pip install 'vllama-jax[convert]'")
    assert not any("safetensors" in request for request in hub.requests if request.startswith("GET"))


@pytest.mark.slow
def test_original_files_are_converted_once(hub: Hub, tiny_files, tiny_model, tmp_path, monkeypatch):
    model = open_model(tiny_model)
    export.export(model, export.plan_export(model), tmp_path / "exported")
    files = read_files(tmp_path / "exported")
    first = hub.commit(NAME, files)
    done = run_vllama("inspect", f"hf://{NAME}", "--json", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "cache/converted" / NAME.replace("/", "--") / first
    assert done.stderr == f"vllama: hf://{NAME}: downloading and converting it to {out}; this is done once\n"
    assert read_hashes(out) == read_hashes(tiny_model)
    assert open_model(out).config.template == "llama_2"  # of the published repositories of this name
    for blobs in (tmp_path / "hub").glob("models--*/blobs"):  # the original files are not needed any more
        shutil.rmtree(blobs)
    assert open_model(f"hf://{NAME}").path == out
    hub.commit(NAME, files | {"vl.pth": b"no torch file"})
    message = expect_error_line("inspect", f"hf://{NAME}")
    assert message.startswith(f"hf://{NAME}: cannot be converted: ")
    assert "vl.pth" in message
    assert [path.name for path in out.parent.iterdir()] == [first]
    assert open_model(f"hf://{NAME}@{first}").path == out


def test_missing_encoders_are_downloaded_where_they_are_published(tiny_files, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLAMA_CACHE", str(tmp_path / "cache"))
    published = {tiny_files[name].name: tiny_files[name] for name in ("eva_vit", "blip2")}
    handler = http.server.SimpleHTTPRequestHandler
    folder = tmp_path / "published"
    folder.mkdir()
    for name, file in published.items():
        shutil.copyfile(file, folder / name)
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: handler(*arguments, directory=folder)
    ) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        for name in ("eva_vit", "blip2"):
            url = f"http://127.0.0.1:{server.server_port}/{tiny_files[name].name}"
            monkeypatch.setitem(FILE_SPECS, name, dataclasses.replace(FILE_SPECS[name], url=url))
        others = {name: file for name, file in tiny_files.items() if name not in ("eva_vit", "blip2")}
        planned = plan(others, published_encoders=True)
        server.shutdown()
    convert.convert(planned, tmp_path / "model")
    assert read_hashes(tmp_path / "model") == read_hashes(tiny_model)
    assert {file.name for file in (tmp_path / "cache/downloads").iterdir()} == published.keys()
    assert plan(others, published_encoders=True).sources.keys() == planned.sources.keys()  # from the cache
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(
        CheckpointError, match=r"cannot be downloaded \(.*refused.*; download it yourself to .*eva_vit_g"
    ):
        plan(others, published_encoders=True)
