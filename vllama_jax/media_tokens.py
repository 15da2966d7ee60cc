"""From a media file to the media tokens that the language model reads: read, preprocess, encode."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vllama_jax import media as media_files
from vllama_jax.branches import BRANCHES, Branch, get_branches
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.errors import ConfigError, MediaError
from vllama_jax.media import Audio, FrameSampling, Image, MediaReport, MediaSource, Video
from vllama_jax.segments import SegmentedMedia, combine_reports
from vllama_jax.text import prompts
from vllama_jax.towers import get_tower

if TYPE_CHECKING:
    import jax

    from vllama_jax.model import Model
    from vllama_jax.nn.video_llama import VideoLlama

DEFAULT_SAMPLING = FrameSampling()


@dataclasses.dataclass(frozen=True)
class PreparedMedia:
    """The arrays of a media file that the network takes.

    Attributes:
        report: What was read from the file.
        frames: Normalized frames [t, h, w, 3]; None for audio.
        mel: Log-mel spectrograms of audio clips [s, 128, 204]; None without audio.
        seconds: Timestamps of the frames of a video, in seconds.
        clip_starts: Start of each audio clip, in seconds since the first sample; empty without audio.
    """

    report: MediaReport
    frames: np.ndarray | None
    mel: np.ndarray | None
    seconds: tuple[float, ...] = ()
    clip_starts: tuple[float, ...] = ()

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that the file has, by name: that of the audio precedes that of the frames, as in a prompt."""
        arrays = {"mel": self.mel, "frames": self.frames}
        return {name: array for name, array in arrays.items() if array is not None}

    @property
    def prompt_media(self) -> prompts.Media:
        """The description of the file for a prompt."""
        return prompts.Media(self.report.kind, self.mel is not None and self.frames is not None, self.seconds)


@dataclasses.dataclass(frozen=True)
class EncodedMedia:
    """A media file that was encoded.

    Attributes:
        tokens: Its media tokens [n, width of the language model], in the order of the prompt.
        prompt_media: Its description for a prompt.
        report: What was read from the file.
    """

    tokens: "list[jax.Array]"
    prompt_media: prompts.Media
    report: MediaReport


def check_num_frames(config: VideoLlamaConfig, option: str, num_frames: int | None, advice: str) -> None:
    """Check that a model has learned positions for a number of frames.

    Args:
        config: The model's config.
        option: The name of the option with the number, for the error message.
        num_frames: The number of frames; None is always valid.
        advice: What to do instead, for the error message.

    Raises:
        ConfigError: The number is larger than that of the learned positions.
    """
    if (num_frames or 0) > config.num_frame_positions:
        raise ConfigError(
            f"{option} {num_frames}, but the model has {config.num_frame_positions} learned frame positions; {advice}"
        )


def prepare_media(
    source: MediaSource,
    config: VideoLlamaConfig,
    *,
    sampling: FrameSampling = DEFAULT_SAMPLING,
    num_frames: int | None = None,
    audio: bool = True,
    require_audio: bool = False,
    interpolate_positions: bool = False,
    allow_url: bool = False,
) -> PreparedMedia:
    """Read and preprocess a video, an image or audio for a model. Needs neither the model's weights nor jax.

    Args:
        source: A file, a directory of images, bytes, a file object, arrays or a URL; see `media.open_source`.
        config: The model's config.
        sampling: Which frames of a video are sampled, and from which window; by default `config.num_frames` of all.
        num_frames: Short for `FrameSampling(num_frames=…)`.
        audio: Whether to use the audio of a video.
        require_audio: Raise an error if the file's audio is not used.
        interpolate_positions: Accept more frames of `sampling.fps` than the model has learned positions.
        allow_url: Whether http and https URLs are downloaded.

    Raises:
        MediaError: The source cannot be used, or its audio is required and was not used.
        ConfigError: The number of frames is below 1 or above that of the learned positions.
    """
    sampling = resolve_sampling(sampling, num_frames, config)
    limit = None if interpolate_positions else config.num_frame_positions
    size, clips = config.vit.image_size, config.num_clips
    media = media_files.read_media(source, sampling, size, audio, clips, max_positions=limit, allow_url=allow_url)
    return preprocess_media(media, config, require_audio=require_audio)


def resolve_sampling(sampling: FrameSampling, num_frames: int | None, config: VideoLlamaConfig) -> FrameSampling:
    """Return a sampling that has a number of frames or a rate: `num_frames`, or else the model's number.

    Raises:
        ConfigError: `num_frames` is below 1, or given in addition to those of `sampling`.
    """
    if num_frames is not None:
        if num_frames < 1:
            raise ConfigError(f"the number of frames must be at least 1, not {num_frames}")
        if sampling.num_frames is not None:
            raise ConfigError("num_frames is given twice: omit it, or that of the sampling")
        sampling = dataclasses.replace(sampling, num_frames=num_frames)
    if sampling.num_frames is None and sampling.fps is None:
        sampling = dataclasses.replace(sampling, num_frames=config.num_frames)
    return sampling


def preprocess_media(
    media: Video | Image | Audio, config: VideoLlamaConfig, *, require_audio: bool = False
) -> PreparedMedia:
    """Preprocess media that `media.read_media` returned: normalize frames and compute spectrograms.

    Args:
        media: The media.
        config: The model's config.
        require_audio: Raise an error if the file's audio is not used.

    Raises:
        MediaError: The file has only audio, which cannot be used, or its audio is required and was not used.
    """
    report, mel = media.report, _compute_mel(media, config.num_clips)
    path = report.path
    if mel is not None and all(branch.prompt_array != "mel" for branch in get_branches(config)):
        report, mel = dataclasses.replace(report, audio="unsupported"), None
    if report.kind == "audio" and mel is None:
        raise MediaError(f"{path}: the file has only audio, which cannot be used: {report}")
    if require_audio and report.audio != "used":
        raise MediaError(f"{path}: the audio is required, but was not used: {report}")
    tower = get_tower(config.vit)
    frames = None if isinstance(media, Audio) else media_files.normalize(media.frames, tower.mean, tower.std)
    seconds = tuple(media.timestamps) if isinstance(media, Video) else ()
    clip_starts = () if mel is None else _list_clip_starts(media, config.num_clips)
    return PreparedMedia(report, frames, mel, seconds, clip_starts)


def _compute_mel(media: Video | Image | Audio, num_clips: int) -> np.ndarray | None:
    """Return the log-mel spectrograms of audio, which may have been read without `num_clips`; None without audio."""
    if isinstance(media, Image):
        return None
    if media.waveform is not None and media.sample_rate is not None:
        return media_files.mel_clips(media.waveform, media.sample_rate, num_clips)
    return media.mel


def _list_clip_starts(media: Video | Image | Audio, num_clips: int) -> tuple[float, ...]:
    """Return the start of each audio clip, in seconds since the first sample."""
    duration = media.audio_duration if isinstance(media, Video) else media.report.duration
    if isinstance(media, Video) and media.waveform is not None and media.sample_rate is not None:
        duration = media.waveform.shape[1] / media.sample_rate
    return () if duration is None else media_files.clip_start_seconds(duration, num_clips)


def encode_media(
    network: "VideoLlama", prepared: PreparedMedia, *, interpolate_positions: bool = False
) -> "list[jax.Array]":
    """Encode a media file to media tokens.

    Args:
        network: The model's network.
        prepared: The file, as `prepare_media` returns it.
        interpolate_positions: Interpolate the learned positions for more frames than the model has positions.

    Returns:
        Tokens [n, width of the language model], first of the audio, then of the frames, if the file has them.

    Raises:
        ConfigError: There are more frames than learned positions, and `interpolate_positions` is false.
    """
    import jax.numpy as jnp

    arrays = prepared.arrays
    branches = [branch for name in arrays for branch in network.branches if branch.prompt_array == name]

    def encode(branch: Branch) -> "jax.Array":
        return _encode(network, branch.name, arrays[branch.prompt_array], interpolate=interpolate_positions)

    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:  # branches compile in parallel
        encoded = list(zip(branches, pool.map(encode, branches), strict=True))
    by_array = [[tokens for branch, tokens in encoded if branch.prompt_array == name] for name in arrays]
    return [tokens[0] if len(tokens) == 1 else jnp.concatenate(tokens) for tokens in by_array if tokens]


def encode_segments(
    model: "Model", file: SegmentedMedia, *, require_audio: bool = False, interpolate_positions: bool = False
) -> EncodedMedia:
    """Read and encode the segments of a file one at a time. Only their media tokens are kept.

    Args:
        model: The model.
        file: The file, whose sampling has a number of frames (`resolve_sampling`).
        require_audio: Raise an error if the audio of a segment is not used.
        interpolate_positions: Interpolate the learned positions for more frames than the model has positions.

    Raises:
        MediaError: The file cannot be used, or its audio is required and was not used.
        ConfigError: There are more frames than learned positions, and `interpolate_positions` is false.
    """
    config = model.config
    size, clips = config.vit.image_size, config.num_clips
    tokens, segments, reports = [], [], []
    for span, media in media_files.read_segments(file.source, file.sampling, size, file.audio, clips):
        prepared = preprocess_media(media, config, require_audio=require_audio)
        tokens += encode_media(model.network, prepared, interpolate_positions=interpolate_positions)
        segments.append(dataclasses.replace(prepared.prompt_media, time_range=span))
        reports.append(prepared.report)
    return EncodedMedia(tokens, prompts.Media(segments[0].kind, segments=tuple(segments)), combine_reports(reports))


def _encode(network: "VideoLlama", branch: str, array: np.ndarray, *, interpolate: bool) -> "jax.Array":
    """Encode the frames or spectrograms of one file to tokens [n, width]. Compiles once for each number of them."""
    from vllama_jax.sharding import get_mesh, use_mesh

    with use_mesh(get_mesh(network)):
        return _compile_encoder(branch, interpolate)(network, array[None])[0]


@functools.cache
def _compile_encoder(name: str, interpolate: bool) -> "Callable[[VideoLlama, np.ndarray], jax.Array]":
    import jax

    branch = BRANCHES[name]
    encoder = branch.encoders[branch.prompt_array]

    def encode(network: "VideoLlama", array: "jax.Array") -> "jax.Array":
        return branch.tokens(network, encoder.encode(network, array), interpolate_positions=interpolate)

    return jax.jit(encode)
