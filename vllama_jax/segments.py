"""Long files in several segments: check that they fit the language model's context, then encode them one at a time."""

import dataclasses
import itertools
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax import media as media_files
from vllama_jax.branches import get_branches
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.errors import ConfigError
from vllama_jax.media import FrameSampling, MediaReport, OpenedSource
from vllama_jax.text import prompts

if TYPE_CHECKING:
    from vllama_jax.text.tokenizer import Tokenizer

_QUESTION_TOKENS = 32  # of a question of about 20 words
_LONG = 36000.0  # s; of a file that declares no duration


def check_segments_fit(
    source: OpenedSource,
    config: VideoLlamaConfig,
    tokenizer: "Tokenizer",
    conversation: prompts.Conversation,
    sampling: FrameSampling,
    audio: bool,
    max_new_tokens: int,
) -> None:
    """Check that the segments of a file, a short question and its answer fit the model's context.

    Nothing is decoded: the tokens are counted with the timestamps that follow from the declared duration.

    Args:
        source: The video or audio.
        config: The model's config.
        tokenizer: The model's tokenizer.
        conversation: The conversation that the file is added to.
        sampling: The window, the number of segments and of their frames.
        audio: Whether the audio is used.
        max_new_tokens: The maximum number of new tokens of an answer.

    Raises:
        ConfigError: They do not fit. The message has the largest number of segments that does.
        MediaError: The file cannot be opened, or is an image.
    """
    kind, has_audio, duration = media_files.read_header(source)
    duration = duration or _LONG  # the digits of timestamps are tokens
    context, reserved = config.llama.max_length, _QUESTION_TOKENS + max_new_tokens
    start, end = sampling.start, max(min(sampling.end, duration), sampling.start)
    counts = count_media_tokens(config)

    def count_tokens(num_segments: int) -> int:
        bounds = np.linspace(start, end, num_segments + 1).tolist()
        segments = []
        for first, last in itertools.pairwise(bounds):
            times = np.linspace(first, last, sampling.num_frames or config.num_frames, endpoint=False).tolist()
            with_audio = audio and has_audio and "audio" in counts
            segments.append(prompts.Media(kind, with_audio, tuple(times) if kind == "video" else (), (first, last)))
        file = prompts.Media(kind, segments=tuple(segments))
        asked = conversation.add(file).ask("")
        lengths = [counts.get(name, 0) for turn in asked.turns for media in turn.media for name in media.placeholders]
        return len(prompts.encode_conversation(asked, tokenizer, lengths).ids) + reserved

    wanted = sampling.segments
    too_many = 1 + context // counts.get(kind, 1)  # of media tokens alone
    if wanted < too_many and count_tokens(wanted) <= context:
        return
    fitting, too_many = 0, min(wanted, too_many)
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if count_tokens(middle) <= context else (fitting, middle)
    most = f"use at most {fitting} segment{'s' if fitting > 1 else ''}"
    advice = most if fitting else "remove turns or media, or set max_new_tokens lower"
    raise ConfigError(
        f"{source.name}: {wanted} segments, a question and an answer of {max_new_tokens} tokens do not fit the model's "
        f"context of {context} tokens; {advice}"
    )


def count_media_tokens(config: VideoLlamaConfig) -> dict[str, int]:
    """Return the number of media tokens for each kind of placeholder that a model supports."""
    counts: dict[str, int] = {}
    for branch in get_branches(config):
        num_queries = branch.qformer_config(config).num_queries
        for kind in ("video", "image") if branch.prompt_array == "frames" else ("audio",):
            counts[kind] = counts.get(kind, 0) + num_queries
    return counts


def combine_reports(reports: list[MediaReport]) -> MediaReport:
    """Return one report on all segments of a file."""
    used = [report for report in reports if report.audio == "used"]
    notes = dict.fromkeys(note for report in reports for note in report.notes)
    if used and len(used) < len(reports):
        notes[f"audio in {len(used)} of them"] = None
    return dataclasses.replace(
        (used or reports)[0],
        num_frames=sum(report.num_frames for report in reports),
        duration=sum(report.duration for report in reports),
        notes=(f"{len(reports)} segments", *notes),
    )
