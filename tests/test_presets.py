"""Presets of mesh and batch size: each divides evenly, fits by the estimate, and is a name after a config's."""

import dataclasses
import json
from pathlib import Path

import pytest

from vllama_jax.aot.topologies import parse_topology
from vllama_jax.cli import main
from vllama_jax.config import video_llama_7b, video_llama_13b
from vllama_jax.errors import ConfigError
from vllama_jax.memory import estimate
from vllama_jax.train.config import rows_per_shard
from vllama_jax.train.config_files import load_config, shipped_configs
from vllama_jax.train.presets import PRESETS, STAGES

COMPILED = Path(__file__).parents[1] / "docs" / "scaling" / "programs.json"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("config", ["vision_stage1", "vision_stage2", "audio_stage1", "audio_stage2"])
def test_a_preset_sets_the_mesh_and_the_batch_size_only(config, name):
    plain, _ = load_config(config)
    preset, _ = load_config(f"{config}@{name}")
    mesh = preset.mesh
    assert mesh.data * mesh.fsdp * mesh.tensor == parse_topology(PRESETS[name].topology).count
    assert rows_per_shard(preset, mesh) == PRESETS[name].rows[config.split("_")[1]]
    assert dataclasses.replace(preset, mesh=plain.mesh, batch_size=plain.batch_size) == plain


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_with_a_twentieth_of_the_memory_to_spare(name):
    device = estimate.DEVICES[parse_topology(PRESETS[name].topology).chip.name]
    for model in (video_llama_7b(), video_llama_13b()):
        for stage in STAGES:
            run = estimate.resolve_compute_dtype(load_config(f"vision_{stage}@{name}")[0], device)
            need = estimate.estimate_training(model, "", run, run.mesh, device)
            assert need.device_total < 0.95 * estimate.usable_bytes(need, device)


def test_the_figures_in_the_docs_are_of_the_presets_and_show_what_they_should():
    for name, report in json.loads(COMPILED.read_text()).items():
        config, _, preset = name.split()[0].partition("@")
        stage = config.split("_")[1]
        assert report["mesh"] == dataclasses.asdict(PRESETS[preset].mesh), name
        assert report["rows"] == PRESETS[preset].rows[stage], name
        assert report["fits"], name
        assert report["hbm_bytes_per_chip"] < 0.95 * report["hbm_limit_bytes"], name
        if preset == "v5e-256" or preset.startswith("v5p"):
            assert report["mfu"] >= {"stage1": 0.5, "stage2": 0.6}[stage], name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vision_stage1@v5e-257", "there is no preset 'v5e-257'; did you mean 'v5e-256'?"),
        ("vision_stage1@", "there is no preset ''; choose one of v5e-16, v5e-64"),
        ("smoke@v5e-16", "smoke: presets are for shipped configs of stage 1 and 2; set mesh and batch_size in it"),
        ("vision_stage9@v5e-16", "vision_stage9: no such run config; give a Python file, or one of"),
    ],
)
def test_a_preset_that_does_not_apply_is_an_error(name, message):
    with pytest.raises(ConfigError) as error:
        load_config(name)
    assert str(error.value).startswith(message)


def test_a_file_may_have_the_mark_of_presets_in_its_name(tmp_path):
    file = tmp_path / "mine@home.py"
    file.write_text("from vllama_jax.configs.vision_stage1 import config\n")
    assert load_config(str(file))[0] == load_config("vision_stage1")[0]


def test_a_preset_names_the_topology_to_compile_for(capsys):
    main(["compile", "vision_stage1@8xH100", "--model", "7b", "--length", "72"])
    assert capsys.readouterr().out.startswith("H100:8")
    with pytest.raises(SystemExit):
        main(["compile", "vision_stage1", "--model", "7b"])
    assert "give a topology: `vllama compile vision_stage1 --topology v5e:16x16`" in capsys.readouterr().err


def test_presets_are_not_run_configs():
    assert "presets" not in shipped_configs()
