"""All steps of `python -m vllama_jax.miniature`, from no files to an evaluated model, with few training steps."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import vllama_jax as vl
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.errors import ConfigError, VllamaError
from vllama_jax.io.atomic import replace_json
from vllama_jax.miniature import base_model, recipe
from vllama_jax.miniature.__main__ import measure_models
from vllama_jax.miniature.recipe import Recipe, make_base_model, train_branches
from vllama_jax.miniature.world import Amounts
from vllama_jax.train.config import AUDIO_BRANCH
from vllama_jax.train.config_files import load_config

SHORT = Recipe(
    amounts=Amounts(24, 12, 40, 16),
    comparison_steps=2,
    language_steps=2,
    pictures=100,
    tower_steps=2,
    hearing_steps=2,
    captioner_steps=2,
    steps_of_runs=2,
)


def test_the_audio_branch_trains_without_audio():
    for stage in (1, 2):
        vision, audio = (load_config(f"miniature_{branch}_stage{stage}")[0] for branch in ("vision", "audio"))
        assert audio.datasets == vision.datasets  # clips and images; the audio of clips is not read in training
        assert (vision.branch, audio.branch, audio.trainable) == ("vision", "audio", AUDIO_BRANCH)


def test_a_directory_of_another_seed_or_recipe_is_refused(tmp_path):
    replace_json(tmp_path / "recipe.json", {"seed": 2, **dataclasses.asdict(SHORT), "pictures": 90})
    message = r"was started with another seed or recipe \(pictures was 90, now 100, seed was 2, now 0\)"
    with pytest.raises(ConfigError, match=message):
        make_base_model(tmp_path, 0, SHORT, print)


def _files(folder: Path) -> dict[str, int]:
    """Return the modification times of all files."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_the_recipe_trains_and_evaluates_a_model(tmp_path, monkeypatch):
    progress = []
    make_base_model(tmp_path, 0, SHORT, progress.append)
    train_branches(tmp_path, SHORT, progress.append)
    results = measure_models(tmp_path, 0, 4, progress.append)
    assert {"motion", "sound_only", "motion_without_positions", "sound_only_random_tower"} <= results.keys()
    model = vl.load(tmp_path / "model")
    assert model.config == base_model.CONFIG
    assert open_model(tmp_path / "base_without_positions").shapes["frame_positions"] == (8, 96)
    bare = vl.load(tmp_path / "model_without_positions").network
    assert not np.any(bare.frame_positions[...])
    assert np.any(model.network.frame_positions[...])
    chat = vl.Chat(model)
    chat.add(next((tmp_path / "world" / "captions").glob("*.mp4")))
    assert isinstance("".join(chat.ask("What do you hear?", max_new_tokens=4)), str)

    result = _files(tmp_path)
    make_base_model(tmp_path, 0, SHORT, progress.append)
    train_branches(tmp_path, SHORT, progress.append)
    assert measure_models(tmp_path, 0, 4, progress.append) == results
    assert _files(tmp_path) == result

    full = open_model(tmp_path / "base").digest  # killed while training the captioner: other files stay
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "base_without_positions")
    (tmp_path / "parts" / "captioner.npz").rename(tmp_path / "parts" / ".captioner.npz.partial")
    make_base_model(tmp_path, 0, SHORT, progress.append)
    made_again = {name for name, when in _files(tmp_path).items() if result[name] != when}
    assert {name.split("/")[0] for name in made_again} == {"parts", "base", "base_without_positions"}
    assert [name for name in made_again if name.startswith("parts")] == ["parts/captioner.npz"]
    assert open_model(tmp_path / "base").digest == full

    longer = dataclasses.replace(SHORT, steps_of_runs=3)
    with pytest.raises(VllamaError, match="`vllama train` failed, see above"):  # it has another number of steps
        train_branches(tmp_path, longer, progress.append)
    monkeypatch.setattr(recipe, "run_vllama", lambda *_: None)
    with pytest.raises(VllamaError, match=r"vision1 was stopped before its last step; run the same command to resume"):
        train_branches(tmp_path, longer, progress.append)
    lines = (tmp_path / "audio2" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == SHORT.steps_of_runs
    assert json.loads(lines[0])["loss"] > 0
