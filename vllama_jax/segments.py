"""Long files in several segments: check that they fit the language model's context, then encode them one at a time."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax import media as media_files
from vllama_jax.branches import get_branches
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.errors import ConfigError
from vllama_jax.media import FrameSampling, MediaHeader, MediaReport, MediaSource
from vllama_jax.text import prompts

if TYPE_CHECKING:
    from vllama_jax.text.tokenizer import Tokenizer

_QUESTION_TOKENS = 32  # of a question of about 20 words
_LONG = 36000.0  # s; of a file that declares no duration


@dataclasses.dataclass(frozen=True)
class SegmentedMedia:
    """A video or audio that is read and encoded in several segments.

    Attributes:
        source: The video or audio.
        name: Its name for messages.
        header: What it declares.
        sampling: The window, the number of segments, and the number of frames to sample from each.
        audio: Whether the audio of a video is used.
    """

    source: MediaSource
    name: str
    header: MediaHeader
    sampling: FrameSampling
    audio: bool


def open_segments(source: MediaSource, sampling: FrameSampling, audio: bool) -> SegmentedMedia:
    """Open a video or audio that is read in several segments, without decoding it.

    Args:
        source: The video or audio; see `media.open_source`.
        sampling: The window, the number of segments, and the number of frames to sample from each.
        audio: Whether to use the audio of a video.

    Raises:
        MediaError: The source cannot be opened, or is an image.
    """
    with media_files.open_source(source) as opened:
        return SegmentedMedia(source, opened.name, media_files.read_header(opened), sampling, audio)


def check_segments_fit(
    files: Sequence[SegmentedMedia],
    config: VideoLlamaConfig,
    tokenizer: "Tokenizer",
    conversation: prompts.Conversation,
    max_new_tokens: int,
    question: str | None = None,
) -> None:
    """Check that the segments of files, a question and its answer fit the model's context.

    Nothing is decoded: the tokens are counted with the timestamps that follow from the declared durations.

    Args:
        files: The videos and audio, with the same number of segments.
        config: The model's config.
        tokenizer: The model's tokenizer.
        conversation: The conversation that the files are added to.
        max_new_tokens: The maximum number of new tokens of an answer.
        question: The question; None for one of about 20 words.

    Raises:
        ConfigError: They do not fit. The message has the largest number of segments that does.
    """
    context = config.llama.max_length
    reserved = max_new_tokens + (_QUESTION_TOKENS if question is None else 0)
    counts = count_media_tokens(config)

    def count_tokens(num_segments: int) -> int:
        asked = conversation
        for file in files:
            asked = asked.add(_describe_segments(file, config, num_segments))
        asked = asked.ask(question or "")
        lengths = [counts.get(name, 0) for turn in asked.turns for media in turn.media for name in media.placeholders]
        return len(prompts.encode_conversation(asked, tokenizer, lengths).ids) + reserved

    wanted = files[0].sampling.segments
    too_many = 1 + context // counts.get(files[0].header.kind, 1)  # of media tokens alone
    if wanted < too_many and count_tokens(wanted) <= context:
        return
    fitting, too_many = 0, min(wanted, too_many)
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if count_tokens(middle) <= context else (fitting, middle)
    most = f"use at most {fitting} segment{'s' if fitting > 1 else ''}"
    advice = most if fitting else "remove turns or media, or set max_new_tokens lower"
    raise ConfigError(
        f"{', '.join(file.name for file in files)}: {wanted} segments{' each' if len(files) > 1 else ''}, a question "
        f"and an answer of {max_new_tokens} tokens do not fit the model's context of {context} tokens; {advice}"
    )


def _describe_segments(file: SegmentedMedia, config: VideoLlamaConfig, num_segments: int) -> prompts.Media:
    """Return the description of a file for a prompt, if it had this number of segments and its declared duration."""
    sampling, (kind, has_audio, duration) = file.sampling, file.header
    start, end = sampling.window
    end = max(min(end, duration or _LONG), start)  # the digits of timestamps are tokens
    with_audio = file.audio and has_audio and "audio" in count_media_tokens(config)
    segments = []
    for first, last in itertools.pairwise(np.linspace(start, end, num_segments + 1).tolist()):
        times = np.linspace(first, last, sampling.num_frames or config.num_frames, endpoint=False).tolist()
        segments.append(prompts.Media(kind, with_audio, tuple(times) if kind == "video" else (), (first, last)))
    return prompts.Media(kind, segments=tuple(segments))


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
