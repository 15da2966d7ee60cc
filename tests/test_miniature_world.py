"""The synthetic dataset: how scenes look, their annotations, and what is held out for tests."""

import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import vllama_jax as vl
from vllama_jax.miniature import evaluate, holdout_files, language, render, texts, world
from vllama_jax.miniature.images import NO_PHRASE, draw_images, phrase_ids, phrases
from vllama_jax.miniature.scene import (
    CHANGES,
    COLORS,
    DIRECTIONS,
    KINDS,
    MOTIONS,
    PLACES,
    ObjectGroup,
    Scene,
    draw_scene,
    is_held_out,
)
from vllama_jax.miniature.shapes import SHAPES, shape_mask
from vllama_jax.miniature.synthesis import SYNTHESIZERS
from vllama_jax.miniature.world import Amounts, write_clip, write_image, write_wav, write_world
from vllama_jax.text import prompts
from vllama_jax.text.prompts import Media


def scene(motion="rests", kind="bell", color="red", **fields) -> Scene:
    return Scene((ObjectGroup(kind=kind, color=color, motion=motion, **fields),), (kind,))


def frames(given: Scene, seed: int = 0) -> np.ndarray:
    return np.stack(list(render.render_frames(given, np.random.default_rng(seed))))


def red(picture: np.ndarray) -> np.ndarray:
    """Return where an image is red."""
    r, g, b = np.moveaxis(picture.astype(int), -1, 0)
    return (r > 120) & (r > g + 60) & (r > b + 60)


def middle(mask: np.ndarray) -> np.ndarray:
    """Return (row, column) relative to the side length."""
    return np.argwhere(mask).mean(axis=0) / len(mask)


def test_every_kind_has_its_own_outline_and_sound():
    assert set(SHAPES) == set(SYNTHESIZERS) == set(KINDS)
    outlines = {kind: shape_mask(kind)[0] > 0.5 for kind in KINDS}
    for one, other in itertools.combinations(KINDS, 2):
        both = np.logical_and(outlines[one], outlines[other]).sum()
        assert both / np.logical_or(outlines[one], outlines[other]).sum() < 0.85, (one, other)


def test_held_out_combinations_have_only_trained_pairs():
    every = list(itertools.product(KINDS, COLORS, MOTIONS))
    holdout = {combination for combination in every if is_held_out(*combination)}
    assert 1 / 8 < len(holdout) / len(every) < 1 / 6
    for pair in ((0, 1), (0, 2), (1, 2)):
        trained = {tuple(one[i] for i in pair) for one in every if one not in holdout}
        assert trained == {tuple(one[i] for i in pair) for one in every}


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_belong_to_their_split(split):
    rng = np.random.default_rng(0)
    for _ in range(300):
        for group in draw_scene(rng, split=split).objects:
            assert is_held_out(group.kind, group.color, group.motion) == (split == "test")


def is_kept_for_tests(group: ObjectGroup) -> bool:
    """Reference: a Latin square of kinds, colors and motions, every seventh combination of which is held out."""
    numbers = list(KINDS).index(group.kind), list(COLORS).index(group.color), MOTIONS.index(group.motion)
    return (numbers[0] + 2 * numbers[1] + 3 * numbers[2]) % 7 == 0


FILE_SETS = [found for found in vars(holdout_files).values() if isinstance(found, holdout_files.FileSet)]


@pytest.mark.parametrize("files", FILE_SETS, ids=lambda files: files.name)
def test_evaluation_scenes_are_all_held_out(files, tmp_path, monkeypatch):
    """The files that `vllama eval miniature` writes, from its own code; they are not rendered."""
    written = []

    def write(stem, files, scene, rng):
        written.append(scene)
        stem.touch()
        return stem

    monkeypatch.setattr(holdout_files, "_write", write)
    monkeypatch.setattr(holdout_files, "prepare_media", lambda path, config, **options: None)
    scenes = [scene for scene, _ in holdout_files._write_and_read((tmp_path, files, 5, range(60), None))]
    assert scenes == written
    assert len(FILE_SETS) == 7
    assert {scene.objects[0].motion for scene in scenes} == set(files.motions)
    assert all(is_kept_for_tests(group) for scene in scenes for group in scene.objects)


def test_training_scenes_are_never_held_out(tmp_path, monkeypatch):
    written = []
    for name in ("write_clip", "write_image"):
        monkeypatch.setattr(world, name, lambda path, scene, rng, **options: written.append(scene))
    for form in ("clip", "still"):
        world._write_part((tmp_path, "captions", form, 0, 150, [5, 2, 0]))
    assert len(written) == 300
    assert not any(is_kept_for_tests(group) for scene in written for group in scene.objects)


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_objects_move_in_their_direction(motion, axis, sign):
    for seed in range(3):
        rendered = frames(scene(motion), seed)
        moved = middle(red(rendered[-1])) - middle(red(rendered[0]))
        assert sign * moved[axis] > 0.25
        assert abs(moved[1 - axis]) < 0.1


@pytest.mark.parametrize(("way", "back"), [("left", "right"), ("up", "down")])
def test_direction_is_visible_only_in_the_order_of_frames(way, back):
    for seed in range(3):
        there, reread = (
            [middle(red(frame)) for frame in frames(scene(one), seed)[render.SAMPLED_FRAMES]] for one in (way, back)
        )
        np.testing.assert_allclose(there, reread[::-1], atol=0.015)  # of the side; 0.02 per frame


def test_objects_grow_shrink_appear_and_vanish():
    sizes = {change: [red(frame).sum() for frame in frames(scene(change))] for change in CHANGES}
    assert sizes["grows"][-1] > 2 * sizes["grows"][0]
    assert sizes["shrinks"][0] > 2 * sizes["shrinks"][-1]
    assert max(sizes["appears"][:6]) < 20 < 100 < min(sizes["appears"][-6:])
    assert max(sizes["vanishes"][-6:]) < 20 < 100 < min(sizes["vanishes"][:6])


def test_two_objects_appear_in_sequence():
    pair = Scene(
        (
            ObjectGroup(kind="bell", color="red", motion="in turn"),
            ObjectGroup(kind="cat", color="blue", motion="in turn"),
        )
    )
    rendered = frames(pair)
    assert red(rendered[0]).sum() > 100 > 20 > red(rendered[-1]).sum()
    assert texts.caption(pair) == "first a large red bell, then a large blue cat"
    assert texts.answer("first", pair) == "a bell"
    assert texts.answer("last", pair) == "a cat"


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_number_of_objects_is_the_scenes(number):
    given = scene(number=number, size="small" if number > 1 else "large", kind="clock")
    picture, objects = render.render_image(given, np.random.default_rng(number))
    _, count = ndimage.label(ndimage.binary_opening(red(picture)))
    assert (count, objects.number) == (number, number)


def test_objects_are_at_their_places():
    for place, name in enumerate(PLACES):
        picture, _ = render.render_image(scene(place=place, size="small"), np.random.default_rng(place))
        row, column = (middle(red(picture)) * 3).astype(int)
        assert (row * 3 + column) == place, name
    picture, objects = render.render_image(scene("left", size="small"), np.random.default_rng(0))
    row, column = (middle(red(picture)) * 3).astype(int)
    assert (row * 3 + column) == objects.place


def test_backgrounds_differ_between_images():
    rng = np.random.default_rng(0)
    first, second = (render.render_image(scene(), rng)[0] for _ in range(2))
    assert (first != second).mean() > 0.5


def test_written_files_can_be_read_by_the_media_reader(tmp_path):
    write_clip(tmp_path / "clip.mp4", scene("left"), np.random.default_rng(0), snr_db=20)
    write_clip(tmp_path / "silent.mp4", scene("left"), np.random.default_rng(0), audio=False)
    write_wav(tmp_path / "sound.wav", scene("left"), np.random.default_rng(0), snr_db=20)
    write_image(tmp_path / "still.jpg", scene(), np.random.default_rng(0))
    video = vl.media.read_video(tmp_path / "clip.mp4", size=64)
    assert (video.frames.shape, video.report.audio, video.duration) == ((8, 64, 64, 3), "used", render.SECONDS)
    assert tuple(video.timestamps) == language.WORLD_SECONDS
    assert vl.media.read_video(tmp_path / "silent.mp4").report.audio == "absent"
    sound = vl.media.read_audio(tmp_path / "sound.wav")
    assert (sound.sample_rate, sound.waveform.shape) == (16_000, (1, 16_000 * render.SECONDS))
    sounds = video.waveform[0, : sound.waveform.shape[1]]  # AAC pads
    assert np.corrcoef(sound.waveform[0, : len(sounds)], sounds)[0, 1] > 0.9  # and loses little
    assert Image.open(tmp_path / "still.jpg").size == (render.FRAME_SIZE, render.FRAME_SIZE)


def test_correct_answers_score_and_wrong_ones_do_not():
    bell = scene("left")
    assert texts.caption(bell) == "a large red bell moves to the left"
    assert texts.is_correct("motion", "It moves to the left.", bell)
    assert not texts.is_correct("motion", "it moves to the right", bell)
    assert texts.is_correct("object", "a bell", bell)
    assert texts.is_correct("object", "bells", scene(number=2, size="small"))
    assert not texts.is_correct("object", "", bell)
    assert not texts.is_correct("hear", "a drum beats", bell)
    assert texts.is_correct("place", "at the upper left", scene(place=0))
    assert not texts.is_correct("place", "at the left", scene(place=0))
    unlike = Scene(bell.objects, ("drum",))
    assert texts.answer("fit", unlike) == "a drum is heard and a bell is seen, so no"
    assert texts.is_correct("fit", "no", unlike)
    assert not texts.is_correct("fit", "yes", unlike)


def test_training_dialogues_have_no_test_wording_and_no_audio_questions():
    rng = np.random.default_rng(0)
    asked = {question for _ in range(300) for question, _ in texts.draw_dialogue(draw_scene(rng), rng, 6)}
    known = {wording: name for name, wordings in texts.QUESTIONS.items() for wording in wordings[:3]}
    assert asked <= known.keys()
    assert {known[question] for question in asked} == texts.QUESTIONS.keys() - set(texts.AUDIO_QUESTIONS)


@pytest.mark.slow
def test_each_prompt_sentence_is_one_token(tmp_path):
    tokenizer = language.train_tokenizer(tmp_path, 0)
    assert tokenizer.vocab_size == language.VOCAB_SIZE
    long = [text for text in language.list_prompt_sentences() if len(text) > 20]
    assert len(long) == 6
    for sentence in long:
        assert len(tokenizer.encode(sentence)) <= 2
    conversation = prompts.start_conversation("vicuna", True).add(Media("audio")).ask("What do you hear?")
    encoded = prompts.encode_conversation(conversation, tokenizer, [8])
    assert len(encoded.ids) < 35
    rng = np.random.default_rng(0)
    drawn = [language.draw_text(tokenizer, rng) for _ in range(50)]
    rows = [ids for ids, _ in drawn]
    assert max(map(len, rows)) < 1.2 * language.TEXTS_SHAPE[1]
    assert len(tokenizer.encode(texts.NO_MEDIA)) < 15  # answers have at most 24 tokens
    assert all(row[0] == tokenizer.bos_id and row.max() < language.VOCAB_SIZE for row in rows)
    noted = [tokenizer.decode(ids[is_description].tolist()) for ids, is_description in drawn]
    assert sum(map(bool, noted)) > 35
    assert all(is_description.shape == ids.shape for ids, is_description in drawn)
    assert not re.search("[#?<]|Human|heard", " ".join(noted))  # only words about what is visible and audible
    read = [tokenizer.decode(row[1:].tolist()) for row in rows]
    compared = [line for text in read if "###" not in text and "so yes" in text for line in text.strip().split("\n")]
    assert len(compared) >= 12
    for line in compared:
        sounds, rendered, message = re.fullmatch("a (.+) is heard and a (.+) is seen, so (yes|no)", line).groups()
        assert (message == "yes") == (sounds == rendered)


def test_sound_annotations_list_sounds_in_order_without_held_out_scenes():
    rng = np.random.default_rng(0)
    for _ in range(100):
        words = language.describe_sounds(("bell", "drum"), rng).replace(",", "").split()
        assert words.index("bell") < words.index("then") < words.index("drum")
    moving = 0
    for _ in range(400):
        words = language.describe_sounds(("bell",), rng).replace(",", "").split()
        assert not set(words) & (KINDS.keys() - {"bell"})
        if "moves" in words:
            (color,), (way,) = COLORS.keys() & set(words), set(DIRECTIONS) & set(words)
            assert not is_held_out("bell", color, way)
            moving += 1
    assert moving > 20


def test_images_match_their_phrases():
    images = draw_images(40, 0)
    numbers, message = phrase_ids(images), phrases()
    assert numbers.shape == (40, len(message))
    for aspect, choices in enumerate(message.values()):
        assert (numbers[:, aspect] < len(choices)).all()
    assert (numbers[:, :3] != NO_PHRASE).all()
    assert (numbers[:, 4] != NO_PHRASE).tolist() == [group.number == 1 for group in images.objects]
    reread = draw_images(40, 0)
    np.testing.assert_array_equal(images.pixels, reread.pixels)
    assert (draw_images(40, 0, "test").pixels != images.pixels).any()


@pytest.mark.slow
def test_a_dataset_is_written_once_and_completely(tmp_path):
    message = []
    write_world(tmp_path, Amounts(3, 2, 4, 2), 0, message.append)
    assert len(message) == 2
    lines = [json.loads(line) for line in (tmp_path / "instructions" / "annotations.jsonl").read_text().splitlines()]
    assert sorted("video" in line for line in lines) == [False] * 2 + [True] * 4
    assert all((tmp_path / "instructions" / (line.get("video") or line["image"])).exists() for line in lines)
    write_world(tmp_path, Amounts(3, 2, 4, 2), 0, message.append)
    assert len(message) == 2


def test_accuracies_have_wilsons_interval():
    assert evaluate.measure([True] * 50 + [False] * 50, 0.5) == {
        "accuracy": 0.5, "n": 100, "chance": 0.5, "low": 0.4038, "high": 0.5962
    }  # fmt: skip
    assert evaluate.measure([True] * 20, 0.5)["high"] == 1.0
    alike = evaluate.measure(np.array([[True, True], [False, False]] * 25), 0.5)  # 50 files, the same questions twice
    assert alike == {**evaluate.measure([True, False] * 25, 0.5), "n": 100}


def test_chance_is_the_best_constant_answer():
    scenes = [Scene((ObjectGroup(kind="bell", color="red", number=number),)) for number in (1, 1, 1, 2)]
    assert evaluate.constant_answer_accuracy("count", scenes) == 0.75
    assert evaluate.constant_answer_accuracy("object", scenes) == 1.0  # several bells are one kind


def test_every_direction_has_an_opposite():
    assert set(DIRECTIONS) == {texts.OPPOSITES[texts.OPPOSITES[way]] for way in DIRECTIONS}
