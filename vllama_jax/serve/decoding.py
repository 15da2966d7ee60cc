"""Decode media files in separate processes with limits of memory and time, because files come from strangers.

A file that exceeds a limit, or that crashes a decoder, ends its process. The pool starts another one, so that only the
request of that file fails.
"""

import asyncio
import contextlib
import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError

import pebble

from vllama_jax.config import VideoLlamaConfig
from vllama_jax.errors import ConfigError, MediaError
from vllama_jax.media import FrameSampling, ImageFrames, MediaFile, check_media
from vllama_jax.media_tokens import PreparedMedia, check_num_frames, prepare_media, resolve_sampling
from vllama_jax.serve.errors import ApiError, log_failure

FILE = "<file>"  # stands for the file in messages, as several requests may wait for it
_PRELOADED = (
    "av.sidedata.sidedata",
    "av.subtitles.stream",
    "PIL.Image",
    "scipy.signal",
    "vllama_jax.media.mel",
    "vllama_jax.media.video",
)


class WrongTypeError(MediaError):
    """A file that is not a media file, or one of another kind than its request says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingJob:
    """A media file to decode.

    Attributes:
        paths: The file; of a video whose frames are images, the images. Valid in all processes of this user.
        kind: The kind of media that it must have; None for any.
        is_frames: Whether it is a video whose frames are images.
        image_rate: Frames per second of images that are frames.
        sampling: Which frames are sampled, and from which window.
        audio: Whether the audio of a video is used.
    """

    paths: tuple[str, ...]
    kind: str | None
    is_frames: bool
    image_rate: float
    sampling: FrameSampling
    audio: bool


def choose_sampling(sampling: FrameSampling, config: VideoLlamaConfig) -> FrameSampling:
    """Return a sampling with the model's defaults: its number of frames, and at most as many as it has positions.

    Raises:
        ConfigError: There are more frames than learned positions.
    """
    if sampling.fps is not None and sampling.max_frames is None:
        sampling = dataclasses.replace(sampling, max_frames=config.num_frame_positions)
    sampling = resolve_sampling(sampling, None, config)
    for name in ("num_frames", "max_frames"):
        check_num_frames(config, name, getattr(sampling, name), "use fewer frames")
    return sampling


class DecoderPool:
    """Processes that decode media files.

    Args:
        config: The model's config.
        processes: The number of processes.
        seconds: The time limit for a file.
        megabytes: The memory limit for a file, in MiB. Only Linux has such a limit.
    """

    def __init__(self, config: VideoLlamaConfig, processes: int, seconds: float, megabytes: int):
        self._config, self._seconds, self._megabytes = config, seconds, megabytes
        self._pool = pebble.ProcessPool(
            max_workers=processes,
            context=multiprocessing.get_context("spawn"),  # JAX has threads, which a fork would not have
            initializer=_limit_process,
            initargs=(megabytes,),
        )

    def start(self) -> None:
        """Start the processes, which import what they need."""
        self._pool.schedule(_do_nothing).result()

    def close(self) -> None:
        """End the processes."""
        self._pool.stop()
        self._pool.join()

    async def decode(self, job: DecodingJob) -> PreparedMedia:
        """Decode a file.

        Raises:
            ApiError: The file cannot be used: 415 if it is not a media file or of another kind, 400 if an option does
                not fit it, 422 otherwise.
        """
        future = self._pool.schedule(_decode, args=(job, self._config), timeout=self._seconds)
        try:
            return await asyncio.wrap_future(future)
        except WrongTypeError as error:
            raise ApiError(415, str(error)) from error
        except ConfigError as error:
            raise ApiError(400, str(error)) from error
        except MediaError as error:
            raise ApiError(422, str(error)) from error
        except (FutureTimeoutError, TimeoutError) as error:
            why = f"decoding takes longer than the limit of {self._seconds:g} s; send a shorter file"
            raise ApiError(422, f"{FILE}: {why}") from error
        except MemoryError as error:
            why = f"decoding needs more than the limit of {self._megabytes} MiB; send a smaller file"
            raise ApiError(422, f"{FILE}: {why}") from error
        except pebble.ProcessExpired as error:
            why = "decoding it ended the decoder, by its size or by corrupt content; convert it to another format"
            raise ApiError(422, f"{FILE}: {why}") from error
        except (ValueError, TypeError, LookupError, ArithmeticError, OSError, RuntimeError, ImportError) as error:
            log_failure(error)  # a decoder does not handle this file
            raise ApiError(422, f"{FILE}: it cannot be decoded; convert it to another format") from error


def _limit_process(megabytes: int) -> None:
    """Import the decoders, then limit what this process may allocate, write and open."""
    import importlib

    for module in _PRELOADED:
        importlib.import_module(module)
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")  # data and stack
    for limit, value in (
        (resource.RLIMIT_DATA, used + megabytes * 2**20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        with contextlib.suppress(ValueError):  # above the limit that the process has already
            resource.setrlimit(limit, (value, value))


def _do_nothing() -> None:
    """Wait until a process has started."""


def _decode(job: DecodingJob, config: VideoLlamaConfig) -> PreparedMedia:
    """Decode a file in a process of the pool.

    Raises:
        WrongTypeError: It is not a media file, or of another kind.
        MediaError: It cannot be used.
        ConfigError: An option does not fit it.
    """
    try:
        for path in job.paths:
            _check_type(path)
        source = (
            ImageFrames(job.paths, job.image_rate, FILE) if job.is_frames else MediaFile(path=job.paths[0], name=FILE)
        )
        prepared = prepare_media(source, config, sampling=job.sampling, audio=job.audio)
    except (MediaError, ConfigError) as error:
        raise type(error)(_replace_paths(str(error), job.paths)) from None
    if job.kind is not None and prepared.report.kind != job.kind:
        kind = prepared.report.kind
        raise WrongTypeError(f"{FILE}: the file has the kind {kind}, not {job.kind}; send it as {kind}_url")
    return prepared


def _check_type(path: str) -> None:
    try:
        check_media(path)
    except MediaError as error:
        raise WrongTypeError(str(error)) from error


def _replace_paths(message: str, paths: Sequence[str]) -> str:
    for path in paths:
        message = message.replace(path, FILE)
    return message
