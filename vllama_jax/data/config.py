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


BARE_CAPTION = TextConfig()


INSTRUCTED_CAPTION = TextConfig(instructions=ALIGNMENT_INSTRUCTIONS, max_length=320)


CONVERSATION = TextConfig(layout="conversation", max_length=512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset of the mix.

    Attributes:
        path: A records directory, as `vllama data build` makes it.
        ratio: Its share of the steps, relative to the others'.
        text: How its words become tokens.
        frames: Which frames of a video are taken: evenly spaced ones, or random ones, half of each half.
        held_out: So many of its records of each kind of media are kept for validation and never trained on.
    """

    path: str
    ratio: float = 1.0
    text: TextConfig = BARE_CAPTION
    frames: Literal["uniform", "head_tail"] = "uniform"
    held_out: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How records become batches.

    Attributes:
        lengths: Sequences are padded to the first of these that holds a step's longest; one program is compiled for
            each that occurs.
        crop_area: The least share of a picture's area that its random crop keeps; 1 for no crop.
        crop_ratio: The widest and tallest crop, as width over height.
        variants: Random crops (and random frames) of a record before they repeat; 0 for new ones every time.
        threads: How many samples are decoded at a time on each host.
        processes: Decode in so many processes, each with its share of the threads, at least one; 0 for none.
        prefetch: How many batches are ready ahead of the step, at most; with processes, in each of them.
        features: A directory that `vllama features` made: what the frozen encoders see is read there, and no media.
            Its variants are taken, unless `variants` asks for fewer.
    """

    lengths: tuple[int, ...] = (48, 72, 128, 192, 256, 384, 512)
    crop_area: float = 0.5
    crop_ratio: float = 4 / 3
    variants: int = 0
    threads: int = 8
    processes: int = 0
    prefetch: int = 4
    features: str = ""
