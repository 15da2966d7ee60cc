"""`vllama inspect`, and `vllama verify` of a run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from vllama_jax import cli
from vllama_jax.checkpoints.directory import open_model, write_config
from vllama_jax.checkpoints.restore import unflatten_paths

TRAINED = {"llama_proj/bias": (64,), "video_qformer/queries": (32, 48)}


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> Path:
    """A run directory whose trained weights are ones; nothing is trained for it."""
    out, base = tmp_path_factory.mktemp("run") / "run", open_model(tiny_model)
    out.mkdir()
    where = {"path": str(tiny_model), "digest": base.digest}
    lora = {"rank": 0, "alpha": 16.0, "targets": ["query"]}
    write_config(out, base.config, run={"lora": lora}, base=where)
    weights = {path: jnp.ones(shape) for path, shape in TRAINED.items()}
    ocp.PyTreeCheckpointer().save(out / "step_4/weights", unflatten_paths(weights))
    return out


def run_command(capsys, *arguments: object) -> str:
    cli.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def component_rows(out: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in out.splitlines()}


def test_inspect_lists_components_with_sizes(tiny_model, capsys):
    out = run_command(capsys, "inspect", tiny_model)
    assert out.startswith(f"{tiny_model}: prompt template vicuna; source files eva_vit_g.safetensors, ")
    assert component_rows(out)["vit"] == ["213,061", "float32", "852.2", "kB"]
    assert component_rows(out)["imagebind/audio"] == ["82,176", "float32", "328.7", "kB"]
    assert component_rows(out)["total"] == ["879,397", "3.5", "MB"]


def test_inspect_prints_a_tree_of_parameters(tiny_model, capsys):
    lines = run_command(capsys, "inspect", tiny_model, "--tree").splitlines()
    assert "    │   │       ├── bias [3, 3, 4, 16] float32, 2.3 kB" in lines
    leaves = [line for line in lines if "float32" in line]
    assert len(leaves) == 181
    assert not any("trained" in line for line in leaves)


def test_inspect_prints_json(tiny_model, capsys):
    report = json.loads(run_command(capsys, "inspect", tiny_model, "--json"))
    manifest = json.loads((tiny_model / "manifest.json").read_text())
    assert report["leaves"].keys() == manifest["leaves"].keys()
    assert sum(component["parameters"] for component in report["components"].values()) == 879397
    assert sum(leaf["bytes"] for leaf in report["leaves"].values()) == 4 * 879397
    assert (report["base"], report["sources"]) == (None, manifest["sources"])


def test_inspect_of_a_run_reports_trained_parameters_and_base(run, tiny_model, capsys):
    out = run_command(capsys, "inspect", run)
    assert out.splitlines()[0].startswith(f"{run}: a run with the base model {tiny_model}: ")
    assert out.splitlines()[1] == f"{run / 'step_4'}: 2 trained arrays"
    trained = [line.split() for line in out.splitlines() if line.rstrip().endswith("trained") and "step_4" not in line]
    assert trained == [
        ["llama_proj", "64", "float32", "256", "bytes", "trained"],
        ["video_qformer", "1,536", "float32", "6.1", "kB", "trained"],
    ]
    assert component_rows(out)["total"] == ["879,397", "3.5", "MB"]
    tree = run_command(capsys, "inspect", run, "--tree")
    assert "queries [32, 48] float32, 6.1 kB, trained" in tree
    report = json.loads(run_command(capsys, "inspect", run, "--json"))
    assert report["base"] == str(tiny_model)
    assert {path for path, leaf in report["leaves"].items() if leaf["trained"]} == TRAINED.keys()


def test_inspect_of_a_run_without_digests(run, tiny_model, tmp_path, capsys):
    expected = (
        f"{run}/step_4: no digests recorded (saved by an earlier version); weights are readable\n"
        f"{tiny_model}: 181 arrays, 3.5 MB, intact\n"
    )
    assert run_command(capsys, "verify", run) == expected
    corrupt_file = shutil.copytree(run, tmp_path / "run")
    data = max((corrupt_file / "step_4/weights").rglob("d/*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-7] + b"changed")
    with pytest.raises(SystemExit, match=f"{corrupt_file}/step_4/weights: "):
        run_command(capsys, "verify", corrupt_file)


def test_a_run_has_no_pytorch_source(run, tiny_model, tiny_files, capsys):
    with pytest.raises(SystemExit, match=f"{run}: a run; compare its base model, {tiny_model}"):
        run_command(capsys, "verify", run, "--against", tiny_files["config"].parent, "--weights-only")


@pytest.mark.slow
def test_inspect_in_a_process_prints_a_model_or_a_one_line_error(tiny_model, tmp_path):
    vllama = Path(sys.executable).with_name("vllama")
    done = subprocess.run([vllama, "inspect", tiny_model], capture_output=True, text=True, check=True)
    assert component_rows(done.stdout)["ln_vision"] == ["128", "float32", "512", "bytes"]
    done = subprocess.run([vllama, "inspect", tmp_path / "none"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"vllama: {tmp_path / 'none'}: no such model directory; create one with `vllama convert`\n"
