"""What a dataset is and how its records become batches: frozen dataclasses, part of a TrainConfig."""

import dataclasses
from typing import Literal

from vllama_jax.text.training import ALIGNMENT_INSTRUCTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a record's words become tokens and labels (text/training.py).

    Attributes:
        layout: "caption" learns what follows the media; "conversation" learns the answers of all turns.
        template: The prompt template; the model's own when empty. "llama_2_literal" is the original's LLaMA-2 prompt
            with a backslash and an n for each newline.
        instructions: A caption follows one of these, drawn for each sample; without any it follows the media alone.
        clean: Captions in lower case and without punctuation, as the original's blip_caption.
        max_length: Longest text in tokens: of a caption with its end, or of a whole conversation with its media.
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
    """One dataset of the mix.

    Attributes:
        path: A records directory, as `vllama data build` makes it.
        ratio: Its share of the steps, relative to the others'.
        text: How its words become tokens.
        frame_sampling: Which frames of a video are taken: evenly spaced ones, or random ones, half of each half.
        holdout: So many of its records of each kind of media are kept for validation and never trained on.
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
        length_buckets: Padded sequence lengths, in tokens. A batch is padded to the first one that holds its longest
            sequence; one program is compiled for each length that occurs.
        min_crop_area: The least share of a picture's area that its random crop keeps; 1 for no crop.
        max_crop_aspect_ratio: The widest and tallest crop, as width over height.
        variants: Random crops (and random frames) of a record before they repeat; 0 for new ones every time.
        num_threads: How many samples are decoded at a time on each host.
        num_workers: Decode in so many processes, each with its share of the threads, at least one; 0 for none.
        prefetch: How many batches are ready ahead of the step, at most; with processes, in each of them.
        feature_cache: A directory of precomputed features (`vllama features`), read instead of the media files. All its
            variants are used, unless `variants` asks for fewer.
    """

    length_buckets: tuple[int, ...] = (48, 72, 128, 192, 256, 384, 512)
    min_crop_area: float = 0.5
    max_crop_aspect_ratio: float = 4 / 3
    variants: int = 0
    num_threads: int = 8
    num_workers: int = 0
    prefetch: int = 4
    feature_cache: str = ""
