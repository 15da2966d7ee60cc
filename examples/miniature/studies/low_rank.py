"""Study: stage 2 with a frozen language model, with low-rank updates, with all weights (docs/studies/low_rank.md).

    python -m vllama_jax.miniature.studies.low_rank OUT --seeds 0 1 2

trains the vision branch in stage 1, then stage 2 from it once for each update of the language model. It
measures what the vision branch gains, and what other inputs of the language model lose. runs.py describes OUT.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import tyro

import vllama_jax as vl
from vllama_jax import generate
from vllama_jax.chat import make_engine
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.miniature import language, texts
from vllama_jax.miniature.command import run_command
from vllama_jax.miniature.evaluate import FileSets, Measure, constant_answer_accuracy, evaluate_sets, measure
from vllama_jax.miniature.holdout_files import BATCH
from vllama_jax.miniature.questions import generate_tokens
from vllama_jax.miniature.scene import DIRECTIONS, Scene, draw_scene, randomize_sound
from vllama_jax.miniature.studies.runs import (
    MODEL,
    Sizes,
    Study,
    check_numbers,
    make_config,
    measure_once,
    run_study,
    train_branch,
    write_base,
)
from vllama_jax.miniature.studies.tables import Setting, Table
from vllama_jax.miniature.world import make_generator
from vllama_jax.model import Model
from vllama_jax.text import prompts
from vllama_jax.text.prompts import Media
from vllama_jax.text.templates import find_template
from vllama_jax.train.config import LORA, VISION_BRANCH, LoraConfig

NEW = ("video_qformer", "frame_positions")  # components that stage 1 trains from scratch
VISION = ("object", "colour", "motion", "count", "first", "last")
NEW_WORDING = ("object_new_wording", "colour_new_wording", "motion_new_wording")
ELSEWHERE = ("sound_only", "sound_order", "hear_nothing", "see_nothing")
WORDS = "words"
WORD_QUESTIONS: dict[str, str] = {"object": "video", "colour": "video", "motion": "video", "hear": "audio"}


def make_tables(study: Study, ranks: Sequence[int]) -> list[Table]:
    """Train and measure all settings.

    Args:
        study: The study.
        ranks: The ranks of the updates to compare with a frozen language model and with all of its weights.

    Returns:
        The table of visual questions, and that of all other questions.
    """
    updates = _list_updates(ranks)
    packaged = vl.load(MODEL)
    sets = FileSets(packaged, study.sizes.files_seed, study.sizes.files, study.log)
    base = write_base(study, "base", packaged.config, NEW)

    def train(name: str, seed: int) -> Path:
        first = make_config(study, "miniature_vision_stage1", base, "vision", seed=seed)
        init = train_branch(study, f"stage1_seed{seed}", first)
        changes = {"seed": seed, "init": str(init), **updates[name]}
        second = make_config(study, "miniature_vision_stage2", base, "vision", **changes)
        return train_branch(study, _run_name(name, seed), second)

    def measure_run(name: str, seed: int) -> dict[str, Measure]:
        model = vl.load(train(name, seed))
        measures = evaluate_sets(sets.for_model(model), (*VISION, *NEW_WORDING, *ELSEWHERE))
        return measures | {WORDS: measure_words(model, study.sizes.files_seed, study.sizes.files)}

    found = {
        name: [
            measure_once(study, _run_name(name, seed), functools.partial(measure_run, name, seed))
            for seed in study.seeds
        ]
        for name in updates
    }
    facts = {name: {"trained weights of LLaMA": f"{_count_trained(study, name):,}"} for name in updates}

    def make_table(name: str, title: str, measures: tuple[str, ...]) -> Table:
        settings = [
            Setting(update, facts[update], [{one: seed[one] for one in measures} for seed in found[update]])
            for update in updates
        ]
        return Table(name, title, settings)

    return [
        make_table("low_rank_vision", "Visible objects, by what stage 2 trains", (*VISION, *NEW_WORDING)),
        make_table("low_rank_elsewhere", "Other inputs and questions, by what stage 2 trains", (WORDS, *ELSEWHERE)),
    ]


def _list_updates(ranks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """List what stage 2 trains of the language model, with the fields of its run config."""
    with_rank = {"trainable": (*VISION_BRANCH, *LORA)}
    return {
        "frozen": {},
        **{f"rank {rank}": {**with_rank, "lora": LoraConfig(rank=rank)} for rank in ranks},
        "all weights": {"trainable": (*VISION_BRANCH, "llama/*")},
    }


def _run_name(update: str, seed: int) -> str:
    return f"{update.replace(' ', '_')}_seed{seed}"


def _count_trained(study: Study, update: str) -> int:
    """Count the weights of the language model, or of its updates, that a run trained."""
    trained = open_model(study.out / "runs" / _run_name(update, study.seeds[0])).trained[-1].leaves
    return sum(math.prod(shape) for path, shape in trained.items() if path.startswith("llama/"))


def measure_words(model: Model, seed: int, count: int) -> Measure:
    """Measure answers about scenes that are described in words in place of media tokens, as LLaMA is trained.

    Args:
        model: The model. Only its language model is used.
        seed: The seed of the scenes, which are held-out combinations.
        count: The number of scenes. Each has one question for each of WORD_QUESTIONS.

    Returns:
        The measure of all answers; those about a scene depend on each other.
    """
    scenes, embedded = [], []
    for number in range(count):
        rng = make_generator(seed, WORDS, number)
        scene = randomize_sound(draw_scene(rng, DIRECTIONS[number % len(DIRECTIONS)], "test"), rng)
        scenes.append(scene)
        embedded += [_make_prompt(model, scene, name, rng) for name in WORD_QUESTIONS]
    tokens = generate_tokens(model, make_engine(model, BATCH), embedded)
    template = find_template(model.config.template)
    answers = iter([prompts.decode_answer(model.tokenizer, template, one) for one in tokens])
    correct = [
        [texts.is_correct(name, next(answers), scene, (kind,)) for name, kind in WORD_QUESTIONS.items()]
        for scene in scenes
    ]
    chances = [constant_answer_accuracy(name, scenes, (kind,)) for name, kind in WORD_QUESTIONS.items()]
    return measure(correct, float(np.mean(chances)))


def _make_prompt(model: Model, scene: Scene, question: str, rng: np.random.Generator) -> generate.EmbeddedPrompt:
    """Make the prompt of a question about a description in words."""
    if WORD_QUESTIONS[question] == "audio":
        media, description = Media("audio"), language.describe_sounds(scene.sounds, rng)
    else:
        media = Media("video", timestamps=language.WORLD_SECONDS)
        description = language.describe_objects(scene, rng)
    words = np.array([model.tokenizer.encode(description, bos=False, special=False)], np.int32)
    start = prompts.start_conversation(model.config.template, model.config.has_audio)
    conversation = start.add(media).ask(texts.QUESTIONS[question][0])
    encoded = prompts.encode_conversation(conversation, model.tokenizer, [words.shape[1]])
    media_tokens = np.asarray(model.network.embed(jnp.asarray(words))[0])
    return generate.EmbeddedPrompt(encoded.ids, encoded.is_media, media_tokens)


def main(
    out: Path,
    /,
    *,
    ranks: tuple[int, ...] = (2, 8),
    seeds: tuple[int, ...] = (0, 1, 2),
    sizes: Annotated[Sizes, tyro.conf.arg(name="")] = Sizes(),  # noqa: B008 (immutable)
) -> None:
    """Measure what low-rank updates of the language model gain and lose. The same command resumes an interrupted study.

    Args:
        out: The output directory.
        ranks: The ranks of the low-rank updates to compare.
        seeds: The seeds of the runs: of new weights and of the order of records.
        sizes: The sizes of the study.
    """
    check_numbers("--ranks", ranks, 1)
    run_study(out, seeds, sizes, lambda study: make_tables(study, ranks))


if __name__ == "__main__":
    run_command("vllama_jax.miniature.studies.low_rank", main)
