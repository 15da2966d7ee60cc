"""Configs of datasets and of batches: frozen dataclasses, fields of a TrainConfig."""

import dataclasses
from typing import Literal

from vllama_jax.text.training import ALIGNMENT_INSTRUCTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a record's texts become tokens and labels (text/training.py).

    Attributes:
        layout: "caption" has labels on the text after the media; "conversation" on the answers of all turns.
        template: The prompt template; "" for the model's own. "llama_2_literal" is the original's LLaMA-2 prompt, which
            has a backslash and an n for each newline.
        instructions: One of these is drawn for each example and precedes the caption. Without any, the caption follows
            the media directly.
        clean: Convert captions to lower case and remove punctuation, as the original's blip_caption does.
        max_length: Maximum length in tokens: of a caption with its end, or of a whole conversation with its media.
    """

    layout: Literal["caption", "conversation"] = "caption"
    template: str = ""
    instructions: tuple[str, ...] = ()
    clean: bool = False
    max_length: int = 32


PLAIN_CAPTION = TextConfig()


INSTRUCTED_CAPTION = TextConfig(instructions=ALIGNMENT_INSTRUCTIONS, max_length=320)


CONVERSATION = TextConfig(layout="conversation", max_length=512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """A dataset of a run.

    Attributes:
        path: A records directory, written by `vllama data build`.
        ratio: Its sampling ratio: its share of the steps, relative to the other datasets.
        text: How its texts become tokens.
        frame_sampling: How frames of a video are sampled: "uniform" at even intervals; "head_tail" at random, half of
            them from each half of the video.
        holdout: Number of records of each kind of media that are kept for validation and never trained on.
    """

    path: str
    ratio: float = 1.0
    text: TextConfig = PLAIN_CAPTION
    frame_sampling: Literal["uniform", "head_tail"] = "uniform"
    holdout: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How records become batches.

    Attributes:
        length_buckets: Sequences of a step are padded to the smallest of these lengths that fits the longest. One
            program is compiled for each length that occurs.
        min_crop_area: Minimum area of a random crop, as a fraction of the image's area; 1 disables crops.
        max_crop_aspect_ratio: Maximum ratio of a crop's longer side to its shorter side.
        variants: Number of augmented variants (random crops and random frames) of a record before they repeat; 0
            for new ones in every epoch.
        num_threads: Number of examples that are decoded in parallel on each host.
        num_workers: Number of worker processes that decode, which share `num_threads`, at least one each; 0 decodes in
            the main process.
        prefetch: Maximum number of batches that are ready before their step; of each worker process, if there are any.
        feature_cache: A directory written by `vllama features`, whose features are read in place of media. Its number
            of variants applies, unless `variants` is lower; "" for none.
    """

    length_buckets: tuple[int, ...] = (48, 72, 128, 192, 256, 384, 512)
    min_crop_area: float = 0.5
    max_crop_aspect_ratio: float = 4 / 3
    variants: int = 0
    num_threads: int = 8
    num_workers: int = 0
    prefetch: int = 4
    feature_cache: str = ""
