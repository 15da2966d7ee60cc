"""`vllama eval miniature --measures`: which measures are evaluated, and which clips are rendered for them."""

import types

import numpy as np
import pytest

import vllama_jax as vl
from vllama_jax.cli import main
from vllama_jax.errors import ConfigError
from vllama_jax.miniature import evaluate, holdout_files, questions, texts
from vllama_jax.miniature.holdout_files import EncodedFiles
from vllama_jax.miniature.scene import draw_scene, randomize_sound
from vllama_jax.miniature.world import make_generator


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


@pytest.fixture
def scenes(monkeypatch) -> None:
    """Replace the files of an evaluation by their scenes: nothing is rendered or encoded."""

    def encode(model, files, seed, clips, say):
        drawn = []
        for number in range(clips):
            rng = make_generator(seed, files.name, number)
            scene = draw_scene(rng, files.motions[number % len(files.motions)], "test")
            drawn.append(randomize_sound(scene, rng, files.match_probability))
        array = np.zeros((clips, 1))
        return EncodedFiles(drawn, [], array if files.has_frames else None, array if files.has_audio else None)

    monkeypatch.setattr(evaluate, "encode_files", encode)


ABSENT_MEDIA = ("hear_nothing", "hear_nothing_new_wording", "hear_nothing_despite_audio", "see_nothing")


@pytest.mark.parametrize(
    ("answer", "accuracies"),
    [
        (texts.NO_AUDIO, (1, 1, 1, 0)),
        (texts.NO_FRAMES, (0, 0, 0, 1)),
        ("a bell rings", (0, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_absent_media_are_measured_by_what_the_answer_says(scenes, monkeypatch, answer, accuracies):
    asked = []

    def ask(model, files, question):
        asked.append((files.placeholders, question))
        return [answer] * len(files.scenes)

    monkeypatch.setattr(evaluate, "ask", ask)
    found = evaluate.evaluate(None, 0, 6, measures=ABSENT_MEDIA)
    assert tuple(found[name]["accuracy"] for name in ABSENT_MEDIA) == accuracies
    assert [found[name]["n"] for name in ABSENT_MEDIA] == [12, 12, 12, 18]
    assert all(found[name]["chance"] == 0 for name in ABSENT_MEDIA)
    hear, object_, colour, motion = (texts.QUESTIONS[name] for name in ("hear", "object", "colour", "motion"))
    sounds = [(("audio",), hear[0]), (("audio", "video"), hear[0])]
    absent = [(("audio",), wordings[0]) for wordings in (object_, colour, motion)]
    assert asked == [(("video",), hear[wording]) for wording in (0, 0, 3, 3)] + sounds + absent


def test_the_last_answer_of_a_dialogue_is_measured(scenes, monkeypatch):
    names = {wording: name for name, wordings in texts.QUESTIONS.items() for wording in wordings}

    def ask_dialogues(model, files, dialogues):
        """Answer correctly, except the tenth question about every fourth file."""
        answers = []
        for number, (scene, dialogue) in enumerate(zip(files.scenes, dialogues, strict=True)):
            answers.append([texts.answer(names[question], scene, files.placeholders) for question in dialogue])
            if number % 4 == 0 and len(dialogue) == 10:
                answers[-1][-1] = "a mistake"
        return answers

    monkeypatch.setattr(evaluate, "ask_dialogues", ask_dialogues)
    found = evaluate.evaluate(None, 0, 80, measures=("dialogue_first", "dialogue_last"))
    assert [found[name]["accuracy"] for name in ("dialogue_first", "dialogue_last")] == [1, 0.75]
    assert all(0.2 < one["chance"] < 0.7 for one in found.values())


@pytest.mark.slow
def test_dialogues_have_the_answers_of_a_chat(tmp_path):
    model, files, count = vl.load("miniature"), holdout_files.BOTH, 3
    asked = [[texts.QUESTIONS[name][row] for name in ("object", "fit", "motion", "hear")] for row in range(count)]
    answers = questions.ask_dialogues(model, holdout_files.encode_files(model, files, 3, count, print), asked)
    for row in range(count):
        rng = make_generator(3, files.name, row)
        scene = randomize_sound(draw_scene(rng, files.motions[row], "test"), rng, files.match_probability)
        chat = vl.Chat(model)
        chat.add(holdout_files._write(tmp_path / str(row), files, scene, rng))
        assert ["".join(chat.ask(question)) for question in asked[row]] == answers[row]
    assert len({"".join(dialogue) for dialogue in answers}) == count
