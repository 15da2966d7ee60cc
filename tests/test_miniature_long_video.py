"""`python -m vllama_jax.miniature.long_video`: which thing came in which minute of a video of many clips."""

import collections

import numpy as np
import pytest

import vllama_jax as vl
from vllama_jax.miniature import long_video
from vllama_jax.miniature.long_video import draw_script, list_questions, measure_videos
from vllama_jax.miniature.scene import KINDS


def test_questions_are_about_the_script_of_a_video():
    script = draw_script(np.random.default_rng(0), 10, 6)
    assert (len(script.spans), script.spans[2], script.num_clips) == (10, (120.0, 180.0), 60)
    seen, heard = script.kinds["seen"], script.kinds["heard"]
    assert sorted(seen) == sorted(heard)
    assert not any(one == other for one, other in zip(seen, heard, strict=True))
    questions = list_questions(script)
    assert len(questions) == 40
    asked = {one.name: (one.text, one.choices[2]) for one in questions if one.span == 2}
    assert asked == {
        "seen": ("What do you see from 120.0 to 180.0 seconds?", f"a {seen[2]}"),
        "heard": ("What do you hear from 120.0 to 180.0 seconds?", f"a {heard[2]} {KINDS[heard[2]]}"),
        "seen_when": (f"When do you see a {seen[2]}?", "from 120.0 to 180.0 seconds"),
        "heard_when": (f"When do you hear a {heard[2]}?", "from 120.0 to 180.0 seconds"),
    }


def test_the_kind_of_a_span_is_the_most_frequent_answer_about_its_clips():
    script = draw_script(np.random.default_rng(0), 3, 6)
    kinds = script.kinds["seen"]
    found = [collections.Counter({kind: 4, kinds[0]: 2}) for kind in kinds]
    questions = [one for one in list_questions(script) if one.sense == "seen"]
    assert all(long_video._find_span(one, found) == one.span for one in questions)
    found[1] = collections.Counter({"": 6})
    assert [long_video._find_span(one, found) for one in questions] == [0, 0, -1, -1, 2, 2]


@pytest.mark.slow
def test_two_clips_are_asked_about_by_themselves_and_as_segments_of_one_prompt():
    model, options = vl.load("miniature"), {"spans": 2, "clips": 1, "questions": 8, "seed": 0}
    by_clip = measure_videos(model, long_video.answer_clip_by_clip, **options)
    together = measure_videos(model, long_video.answer_from_one_prompt, **options)
    for measures in (by_clip, together):
        assert {name: (one["n"], one["chance"]) for name, one in measures.items()} == {
            **dict.fromkeys(("seen", "heard", "seen_when", "heard_when"), (2, 0.5)),
            "all": (8, 0.5),
        }
    assert by_clip["all"]["accuracy"] >= 7 / 8
    longer = long_video.load_with_long_context(2.0)
    assert longer.config.llama.max_length == long_video.LONG_CONTEXT
    assert longer.config.llama.rope_scaling.factor == 2.0
