"""The packaged miniature: it is available, it answers correctly, and users learn which model answers."""

import json

import pytest
from cli_fixtures import run_vllama

import vllama_jax as vl
from vllama_jax.checkpoints import shipped
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.miniature import assets, evaluate


@pytest.fixture(scope="module")
def miniature() -> vl.Model:
    return vl.load("miniature")


def answer(chat: vl.Chat, question: str) -> str:
    return "".join(chat.ask(question))


def test_the_miniature_is_under_12_mb():
    sizes = [file.stat().st_size for file in assets.ASSETS.rglob("*") if file.is_file()]
    assert sum(sizes) < 6e6


@pytest.mark.slow
def test_chat_without_a_model_uses_the_miniature_and_answers_correctly():
    questions = ["Which way does it go?", "What do you hear?", "Which colour is it?"]
    done = run_vllama("chat", assets.CLIPS / "bell.mp4", *questions)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["it moves to the left", "a bell rings", "yellow"]
    assert (
        "answers are from the miniature, a model of 3 million parameters that knows only 16 objects (a bell, a dog, …)"
        in done.stderr
    )
    assert "docs/miniature.md" in done.stderr
    assert "bell.mp4: 8 frames of 4.0 s; audio used" in done.stderr


@pytest.mark.slow
def test_the_miniature_answers_whether_audio_and_video_match(miniature):
    for clip, message in (("bell.mp4", "yes"), ("dog_or_drum.mp4", "no")):
        chat = vl.Chat(miniature)
        chat.add(assets.CLIPS / clip)
        assert answer(chat, "Does the sound fit the picture?").split()[-1] == message


@pytest.mark.slow
def test_the_miniature_answers_what_comes_first_and_how_many_there_are(miniature):
    chat = vl.Chat(miniature)
    chat.add(assets.CLIPS / "two.mp4")
    assert answer(chat, "What comes first?") == "a frog"
    assert answer(chat, "What comes last?") == "a horn"
    chat = vl.Chat(miniature)
    chat.add(assets.CLIPS / "birds.jpg")
    assert answer(chat, "How many are there?") == "three"


def test_audio_scale_sets_the_norm_of_audio_embeddings(miniature):
    loud = vl.load("miniature", audio_scale=20.0)
    assert miniature.network.imagebind.audio.scale == pytest.approx(1)
    assert loud.network.imagebind.audio.scale == pytest.approx(20)
    for scale in (0.0, -1.0, 101.0, float("nan")):
        with pytest.raises(ConfigError, match="audio scale must be above 0 and at most 100"):
            vl.load("miniature", audio_scale=scale)


def test_audio_scale_needs_an_audio_branch(tmp_path, tiny_files):
    from vllama_jax import convert

    files = {kind: tiny_files[kind] for kind in ("eva_vit", "blip2", "vl")}
    config = json.loads(tiny_files["config"].read_text())
    config = {component: config[component] for component in ("vit", "image_qformer", "video_qformer")}
    convert.convert(convert.plan(llama_directory=tiny_files["llama"], files=files, config=config), tmp_path / "deaf")
    with pytest.raises(ConfigError, match="the model has no audio branch; omit the audio scale"):
        vl.load(tmp_path / "deaf", audio_scale=1.0)


def test_without_the_archive_a_model_is_required(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="the miniature is not installed; set a model with --model"):
        vl.load("miniature")


@pytest.mark.slow
def test_eval_miniature_prints_the_accuracies_of_the_packaged_model():
    done = run_vllama("eval", "miniature", "--seed", 1234, "--clips", 16, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    asked = {"object", "colour", "count", "motion", "motion_shuffled", "motion_reversed_opposite"}
    asked |= {"sound_only", "sound_order", "sound_only_unaligned"}
    assert asked <= found.keys()
    assert all(one.keys() == {"accuracy", "n", "chance", "low", "high"} for one in found.values())
    for name in ("object", "colour", "motion", "motion_reversed_opposite", "sound_only"):
        assert found[name]["accuracy"] >= 0.75, name  # of 16: far above chance for any seed
    assert found["sound_only_unaligned"]["accuracy"] <= 0.4
    assert evaluate.format_measures(found).count("\n") == len(found)
