"""`vllama eval miniature --measures`: which measures are evaluated, and which clips are rendered for them."""

import types

import pytest

from vllama_jax.cli import main
from vllama_jax.errors import ConfigError
from vllama_jax.miniature import evaluate, holdout_files


@pytest.fixture
def rendered(monkeypatch) -> list[str]:
    """The names of the requested sets of files; none is rendered, and every answer is wrong."""
    names: list[str] = []

    def show(model, files, seed, clips, say):
        names.append(files.name)
        return types.SimpleNamespace(scenes=[])

    monkeypatch.setattr(evaluate, "encode_files", show)
    monkeypatch.setattr(
        evaluate, "_measure_answers", lambda model, shown, name, **options: {"accuracy": 0.0, "asked": name}
    )
    return names


def test_only_requested_measures_and_their_clips_are_evaluated(rendered):
    found = evaluate.evaluate(None, 0, 5, measures=("sound_only_at_5_db", "object", "motion"))
    assert {name: one["asked"] for name, one in found.items()} == {
        "motion": "motion",
        "object": "object",
        "sound_only_at_5_db": "hear",
    }
    assert rendered == [holdout_files.MOVING.name, "noise 5.0"]


def test_a_measure_without_clips_is_left_out(rendered):
    assert evaluate.evaluate(None, 0, 5, measures=("place",)) == {}
    assert rendered == [holdout_files.STILLS.name]


def test_an_unknown_measure_is_one_line_with_the_choices(rendered, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "miniature", "--measures", "object", "motoin"])
    assert stopped.value.code.startswith(
        "vllama: --measures motoin: no such measure; did you mean 'motion'? There are motion, motion_new_wording, "
    )
    assert "\n" not in stopped.value.code
    with pytest.raises(ConfigError, match="--measures xyz: no such measure; There are motion, "):
        evaluate.evaluate(None, 0, 5, measures=("xyz",))
    assert not rendered
