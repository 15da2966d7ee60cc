"""Study: the number of frames and of video queries against accuracy (docs/studies/frames_and_queries.md).

    python -m vllama_jax.miniature.studies.frames_and_queries OUT --seeds 0 1 2

trains the vision branch with 1 to 8 frames and with 1 to 16 queries, and measures each. It also gives fewer frames to
the model of the package, which is trained with 8. runs.py describes OUT.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import vllama_jax as vl
from vllama_jax.branches import BRANCHES
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.media.frame_sampling import frame_indices
from vllama_jax.memory.flops import encoder_flops, forward_flops, qformer_flops
from vllama_jax.miniature import render, texts
from vllama_jax.miniature.base_model import CONFIG
from vllama_jax.miniature.command import run_command
from vllama_jax.miniature.evaluate import FileSets, Measure, evaluate_sets
from vllama_jax.miniature.studies.runs import (
    MODEL,
    Sizes,
    Study,
    check_numbers,
    measure_once,
    run_study,
    train_stages,
    write_base,
)
from vllama_jax.miniature.studies.tables import Setting, Table
from vllama_jax.model import Model
from vllama_jax.text import prompts

NEW = ("video_qformer", "frame_positions")  # components that are trained from scratch
MEASURES = ("motion", "object", "colour", "count", "first", "last")


def make_tables(study: Study, frames: Sequence[int], queries: Sequence[int]) -> list[Table]:
    """Train and measure all settings.

    Args:
        study: The study.
        frames: The numbers of frames to train with, and to give to the model of the package.
        queries: The numbers of queries to train with.

    Returns:
        The tables of both, and of the model of the package.
    """
    packaged = vl.load(MODEL)
    config = packaged.config
    with_frames = [dataclasses.replace(config, num_frames=number) for number in frames]
    with_queries = [
        dataclasses.replace(config, video_qformer=dataclasses.replace(config.video_qformer, num_queries=number))
        for number in queries
    ]
    sets = {
        one.num_frames: FileSets(
            dataclasses.replace(packaged, config=one), study.sizes.files_seed, study.sizes.files, study.log
        )
        for one in (config, *with_frames)
    }

    def measure_trained(config: VideoLlamaConfig) -> list[dict[str, Measure]]:
        return [
            measure_once(study, f"{_name(config)}_seed{seed}", functools.partial(train_and_measure, config, seed))
            for seed in study.seeds
        ]

    def train_and_measure(config: VideoLlamaConfig, seed: int) -> dict[str, Measure]:
        name = _name(config)
        base = write_base(study, name, config, NEW)
        run = train_stages(study, f"{name}_seed{seed}", "vision", base, f"frames{config.num_frames}", seed)
        return evaluate_sets(sets[config.num_frames].for_model(vl.load(run)), MEASURES)

    def measure_packaged(config: VideoLlamaConfig) -> list[dict[str, Measure]]:
        number = config.num_frames
        return [measure_once(study, f"packaged_frames{number}", lambda: evaluate_sets(sets[number], MEASURES))]

    def make_table(name: str, title: str, varied: Sequence[tuple[str, VideoLlamaConfig]], measure: Any) -> Table:
        settings = [Setting(label, count_operations(packaged, one), measure(one)) for label, one in varied]
        return Table(name, title, settings)

    frame_labels = [f"{number} frame{'s' if number > 1 else ''}" for number in frames]
    query_labels = [f"{number} quer{'ies' if number > 1 else 'y'}" for number in queries]
    varied_frames = list(zip(frame_labels, with_frames, strict=True))
    varied_queries = list(zip(query_labels, with_queries, strict=True))
    return [
        make_table("frames", "Trained and asked with a number of frames", varied_frames, measure_trained),
        make_table("queries", "Trained with a number of queries", varied_queries, measure_trained),
        make_table(
            "frames_at_inference",
            f"The model of the package, trained with {config.num_frames} frames, asked with a number of frames",
            varied_frames,
            measure_packaged,
        ),
    ]


def _name(config: VideoLlamaConfig) -> str:
    return f"frames{config.num_frames}_queries{config.video_qformer.num_queries}"


def count_operations(model: Model, config: VideoLlamaConfig) -> dict[str, str]:
    """Count the tokens and the floating-point operations of a question about a clip, from shapes.

    Args:
        model: A model, for its tokenizer and template.
        config: The config with the numbers of frames and queries.

    Returns:
        The numbers of media tokens and of tokens of the prompt, and the millions of operations of the vision encoder
        with the image Q-Former, of the video Q-Former, and of the language model for the prompt, without the answer.
    """
    indices = frame_indices(render.FRAMES, config.num_frames)
    media = prompts.Media("video", timestamps=tuple((indices / render.FPS).tolist()))
    conversation = prompts.start_conversation(config.template, config.has_audio).add(media)
    queries = config.video_qformer.num_queries
    encoded = prompts.encode_conversation(conversation.ask(texts.QUESTIONS["motion"][0]), model.tokenizer, [queries])
    length = len(encoded.ids)
    frames = np.empty((1, *BRANCHES["vision"].media_shape(config, "video")), np.uint8)
    operations = {
        "encoders": encoder_flops(config, "vision", {"frames": frames}),
        "video Q-Former": qformer_flops(config, "vision"),
        "LLaMA, prompt": forward_flops(config.llama, 1, length, length),
    }
    return {
        "media tokens": str(queries),
        "tokens of a prompt": str(length),
        **{f"MFLOPs, {name}": f"{value / 1e6:.1f}" for name, value in operations.items()},
    }


def main(
    out: Path,
    /,
    *,
    frames: tuple[int, ...] = (1, 2, 4, 8),
    queries: tuple[int, ...] = (1, 2, 4, 16),
    seeds: tuple[int, ...] = (0, 1, 2),
    sizes: Annotated[Sizes, tyro.conf.arg(name="")] = Sizes(steps2=100),  # noqa: B008 (immutable)
) -> None:
    """Measure accuracy by the number of frames and of queries. The same command resumes an interrupted study.

    Args:
        out: The output directory.
        frames: The numbers of frames to compare.
        queries: The numbers of queries to compare.
        seeds: The seeds of the runs: of new weights and of the order of records.
        sizes: The sizes of the study.
    """
    check_numbers("--frames", frames, 1, CONFIG.num_frame_positions)
    check_numbers("--queries", queries, 1)
    run_study(out, seeds, sizes, lambda study: make_tables(study, frames, queries))


if __name__ == "__main__":
    run_command("vllama_jax.miniature.studies.frames_and_queries", main)
