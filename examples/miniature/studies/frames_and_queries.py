"""Study: the number of frames and of video queries against accuracy (docs/studies/frames_and_queries.md).

    python -m vllama_jax.miniature.studies.frames_and_queries OUT --seeds 0 1 2

trains the vision branch with 1 to 8 frames and with 1 to 16 queries, and measures each. It also gives fewer frames to
the model of the package, which is trained with 8. runs.py describes OUT.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import vllama_jax as vl
from vllama_jax.branches import BRANCHES
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.media.frame_sampling import frame_indices
from vllama_jax.memory.flops import encoder_flops, forward_flops, qformer_flops
from vllama_jax.miniature import render, texts
from vllama_jax.miniature.evaluate import FileSets, Measure, evaluate_sets
from vllama_jax.miniature.studies.runs import (
    MODEL,
    Sizes,
    Study,
    measure_once,
    run_command,
    run_study,
    train_stages,
    write_base,
)
from vllama_jax.miniature.studies.tables import Setting, Table
from vllama_jax.model import Model
from vllama_jax.text import prompts

FRAMES = (1, 2, 4, 8)
QUERIES = (1, 2, 4, 16)
NEW = ("video_qformer", "frame_positions")  # components that are trained from scratch
MEASURES = ("motion", "object", "colour", "count", "first", "last")


def make_tables(study: Study) -> list[Table]:
    """Train and measure all settings."""
    packaged = vl.load(MODEL)
    sets = {
        frames: FileSets(_with_frames(packaged, frames), study.sizes.files_seed, study.sizes.files, study.log)
        for frames in FRAMES
    }

    def measure_trained(config: VideoLlamaConfig) -> Setting:
        frames, queries = config.num_frames, config.video_qformer.num_queries
        name = f"frames{frames}_queries{queries}"

        def measure(seed: int) -> dict[str, Measure]:
            base = write_base(study, name, config, NEW)
            run = train_stages(study, f"{name}_seed{seed}", "vision", base, f"frames{frames}", seed)
            return evaluate_sets(sets[frames].for_model(vl.load(run)), MEASURES)

        seeds = [measure_once(study, f"{name}_seed{seed}", lambda seed=seed: measure(seed)) for seed in study.seeds]
        return Setting(_describe(config), count_operations(packaged, config), seeds)

    def measure_packaged(frames: int) -> Setting:
        model = sets[frames].model
        measures = measure_once(study, f"packaged_frames{frames}", lambda: evaluate_sets(sets[frames], MEASURES))
        return Setting(_describe(model.config), count_operations(packaged, model.config), [measures])

    with_frames = [dataclasses.replace(packaged.config, num_frames=frames) for frames in FRAMES]
    with_queries = [
        dataclasses.replace(
            packaged.config,
            video_qformer=dataclasses.replace(packaged.config.video_qformer, num_queries=queries),
        )
        for queries in QUERIES
    ]
    return [
        Table("frames", "Trained with a number of frames", [measure_trained(config) for config in with_frames]),
        Table("queries", "Trained with a number of queries", [measure_trained(config) for config in with_queries]),
        Table(
            "frames_at_inference",
            "Trained with 8 frames, asked with fewer",
            [measure_packaged(frames) for frames in FRAMES],
        ),
    ]


def _with_frames(model: Model, frames: int) -> Model:
    """Return a model that samples another number of frames from a video."""
    return dataclasses.replace(model, config=dataclasses.replace(model.config, num_frames=frames))


def _describe(config: VideoLlamaConfig) -> str:
    frames, queries = config.num_frames, config.video_qformer.num_queries
    return f"{frames} frame{'s' if frames > 1 else ''}, {queries} quer{'ies' if queries > 1 else 'y'}"


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
    out: tyro.conf.Positional[Path],
    /,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    sizes: Annotated[Sizes, tyro.conf.arg(name="")] = Sizes(),  # noqa: B008 (immutable)
) -> None:
    """Measure accuracy by the number of frames and of queries. The same command resumes an interrupted study.

    Args:
        out: The output directory.
        seeds: The seeds of the runs: of new weights, of the order of records and of dropout.
        sizes: The sizes of the study.
    """
    run_study(out, seeds, sizes, make_tables)


if __name__ == "__main__":
    run_command("vllama_jax.miniature.studies.frames_and_queries", main)
