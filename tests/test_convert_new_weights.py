"""`vllama convert --base MODEL --without COMPONENT`: new weights for one component, all others unchanged."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conversions import convert_command, expect_one_line, read_hashes, read_leaves

import vllama_jax as vl
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli import main
from vllama_jax.config import NO_LORA
from vllama_jax.nn.network import init_weights

BRANCH = ("video_qformer", "frame_positions", "llama_proj")


def of_components(leaves: dict, components: tuple[str, ...]) -> dict:
    return {path: leaf for path, leaf in leaves.items() if path.split("/")[0] in components}


@pytest.fixture(scope="module")
def more_queries(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with 48 queries and new weights in its video Q-Former."""
    folder = tmp_path_factory.mktemp("more")
    (folder / "config.json").write_text(json.dumps({"video_qformer": {"num_queries": 48}}))
    changed = ("--without", "video_qformer", "--config", str(folder / "config.json"))
    main(convert_command({}, folder / "model", "--base", str(tiny_model), *changed))
    return folder / "model"


@pytest.mark.slow
def test_everything_but_the_new_component_is_bit_identical(tiny_model, more_queries):
    before, after = read_hashes(tiny_model), read_hashes(more_queries)
    same = {path for path in before if before[path] == after.get(path)}
    assert {path for path in before if not path.startswith("video_qformer/")} == same
    assert after.keys() == before.keys()


@pytest.mark.slow
def test_the_new_component_equals_the_initial_weights_of_training(more_queries):
    result = open_model(more_queries)
    assert result.config.video_qformer.num_queries == 48
    leaves = of_components(read_leaves(more_queries), ("video_qformer",))
    assert leaves["video_qformer/queries"].shape[-2] == 48
    init = jax.jit(lambda key: init_weights(result.config, NO_LORA, leaves, key))
    for path, expected in init(jax.random.key(42)).items():
        np.testing.assert_array_equal(leaves[path], expected)


@pytest.mark.slow
def test_a_model_with_new_weights_answers(more_queries, clip):
    chat = vl.Chat(vl.load(more_queries))
    chat.add(clip)
    assert "".join(chat.ask("What?", max_new_tokens=3)) == chat.last.answer
    assert len(chat.last.tokens) >= 1


@pytest.mark.slow
def test_the_report_and_the_manifest_say_which_weights_are_new(tiny_model, tmp_path, capsys):
    main(convert_command({}, tmp_path / "model", "--base", str(tiny_model), "--without", *BRANCH, "--seed", "7"))
    assert "  new random weights, to be trained: video_qformer, frame_positions, llama_proj" in capsys.readouterr().out
    sources, old = (open_model(path).manifest["sources"] for path in (tmp_path / "model", tiny_model))
    assert sources["new"] == [{"name": name, "seed": 7} for name in BRANCH]
    assert old.keys() - sources.keys() == {"vl", "minigpt4"}, "files of which nothing is left"


@pytest.mark.slow
def test_another_seed_gives_other_weights(tiny_model, tmp_path):
    for seed in ("1", "2"):
        main(
            convert_command(
                {}, tmp_path / seed, "--base", str(tiny_model), "--without", "video_qformer", "--seed", seed
            )
        )
    one, other = read_hashes(tmp_path / "1"), read_hashes(tmp_path / "2")
    differing = {path for path in one if one[path] != other[path]}
    assert "video_qformer/queries" in differing
    assert {path.split("/")[0] for path in differing} == {"video_qformer"}


def test_components_that_cannot_be_new_are_refused(tiny_files, tiny_model, tmp_path):
    base = ("--base", str(tiny_model))
    refused = {
        "--without video_qfromer: unknown component; did you mean 'video_qformer'?": ({}, *base, "video_qfromer"),
        "--without nothing: unknown component; the model has audio_llama_proj, audio_pos": ({}, *base, "nothing"),
        "--without llama_proj: needs --base, the model directory whose component is replaced": (
            tiny_files,
            "llama_proj",
        ),
        "--without llama_proj: a file or run provides this component; leave one of the two out": (
            {"vl": tiny_files["vl"]},
            *base,
            "llama_proj",
        ),
    }
    for message, (paths, *more, name) in refused.items():
        assert message in expect_one_line(paths, tmp_path, *more, "--without", name)
        (tmp_path / "out").rmdir()
