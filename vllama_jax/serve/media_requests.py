"""Make media tokens of the files of requests: open, decode, encode, and keep those that may be asked about again."""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, Literal, TypeVar

import numpy as np

from vllama_jax.errors import ConfigError
from vllama_jax.media import MediaReport
from vllama_jax.media_tokens import PreparedMedia, encode_media
from vllama_jax.model import Model
from vllama_jax.serve.conversations import MediaReference, count_frames
from vllama_jax.serve.decoding import FILE, DecoderPool, DecodingJob, choose_sampling
from vllama_jax.serve.errors import ApiError, log_failure
from vllama_jax.serve.limits import Limits
from vllama_jax.serve.metrics import Metrics
from vllama_jax.serve.options import MEBIBYTE, ServeOptions
from vllama_jax.serve.responses import MediaInfo
from vllama_jax.serve.sources import digest_file, open_media_url
from vllama_jax.serve.uploads import Uploads
from vllama_jax.text import prompts

CLIP_SECONDS = 2.0  # of an audio clip (media.mel)
MAX_DECODED_BYTES = 64 * MEBIBYTE  # about ten videos: the page shows, asks about and explains the same file
Value = TypeVar("Value")
Encode = Callable[[PreparedMedia], Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class EncodedFile:
    """An encoded media file.

    Attributes:
        prepared: What was read, without its arrays.
        prompt_media: The description of the file for a prompt.
        arrays: What `Encode` returned.
    """

    prepared: PreparedMedia
    prompt_media: prompts.Media
    arrays: Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class RequestedMedia:
    """A media file of a request.

    Attributes:
        encoded: The encoded file.
        info: The report on it.
    """

    encoded: EncodedFile
    info: MediaInfo


class SharedResults(Generic[Value]):
    """Results of computations by key: the least recently used are removed, and equal ones that run are shared.

    Args:
        max_bytes: The largest size of the results that are kept.
        size: Returns the size of a result.
    """

    def __init__(self, max_bytes: int, size: Callable[[Value], int]):
        self._max_bytes, self._size, self._bytes = max_bytes, size, 0
        self._kept: collections.OrderedDict[Hashable, Value] = collections.OrderedDict()
        self._running: dict[Hashable, asyncio.Future[Value]] = {}

    async def get(self, key: Hashable, compute: Callable[[], Awaitable[Value]]) -> tuple[Value, bool]:
        """Return a result, and whether another call computed it."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key], True
        if key in self._running:
            return await asyncio.shield(self._running[key]), True
        running = self._running[key] = asyncio.ensure_future(compute())
        try:
            value = await running
        finally:
            del self._running[key]
        self._kept[key] = value
        self._bytes += self._size(value)
        while self._bytes > self._max_bytes:
            self._bytes -= self._size(self._kept.popitem(last=False)[1])
        return value, False


class MediaReader:
    """Makes media tokens of the files of requests.

    Args:
        model: The model.
        options: The server's options.
        decoders: Decodes files.
        uploads: The uploaded files.
        limits: The totals of all requests.
        metrics: The metrics.
    """

    def __init__(
        self,
        model: Model,
        options: ServeOptions,
        decoders: DecoderPool,
        uploads: Uploads,
        limits: Limits,
        metrics: Metrics,
    ):
        self._model, self._options, self._decoders, self._uploads = model, options, decoders, uploads
        self._limits, self._metrics = limits, metrics
        self._results: SharedResults[EncodedFile] = SharedResults(
            options.cache_megabytes * MEBIBYTE, lambda encoded: sum(array.nbytes for array in encoded.arrays)
        )
        self._decoded: SharedResults[PreparedMedia] = SharedResults(
            MAX_DECODED_BYTES, lambda prepared: sum(array.nbytes for array in prepared.arrays.values())
        )
        self._encoder = concurrent.futures.ThreadPoolExecutor(1, "vllama-encoder")
        self._openers = concurrent.futures.ThreadPoolExecutor(16, "vllama-media")

        self._warm_up: concurrent.futures.Future[None] | None = None

    @property
    def status(self) -> Literal["starting", "ready", "failed"]:
        """Whether the encoders are compiled."""
        if self._warm_up is None or not self._warm_up.done():
            return "starting"
        return "ready" if self._warm_up.cancelled() or self._warm_up.exception() is None else "failed"

    def start(self) -> None:
        """Compile the encoders in their thread: for an image, the default number of video frames, and audio."""
        self._warm_up = self._encoder.submit(self._compile)

    def close(self) -> None:
        """Start no more work."""
        self._encoder.shutdown(wait=self.status != "starting", cancel_futures=True)
        self._openers.shutdown(wait=False, cancel_futures=True)

    async def read(
        self, references: Sequence[MediaReference], owner: str, encode: Encode | None = None
    ) -> list[RequestedMedia]:
        """Read and encode the media files of a request.

        Args:
            references: The files.
            owner: Whose uploaded files may be used.
            encode: Makes arrays of a file; by default the media tokens of the model. Each function has results of its
                own.

        Raises:
            ApiError: A file cannot be used, or a limit is exceeded.
        """
        config = self._model.config
        frames = count_frames(references, config.num_frames, config.num_frame_positions)
        if frames > self._options.max_frames:
            why = f"{frames} video frames, images and audio files are above the limit of {self._options.max_frames}"
            raise ApiError(413, f"{why} for a request; use fewer frames or files")
        # It goes on if the client leaves: another request may wait for the same file.
        return await asyncio.shield(self._read_all(references, owner, encode or self._encode, frames))

    async def _read_all(
        self, references: Sequence[MediaReference], owner: str, encode: Encode, frames: int
    ) -> list[RequestedMedia]:
        with self._limits.reserve(frames=frames):
            found = await asyncio.gather(
                *(self._read_one(one, owner, encode) for one in references), return_exceptions=True
            )
        for result in found:
            if isinstance(result, BaseException):
                raise result
        return [result for result in found if not isinstance(result, BaseException)]

    async def _read_one(self, reference: MediaReference, owner: str, encode: Encode) -> RequestedMedia:
        place = reference.part
        try:
            sampling = choose_sampling(reference.sampling, self._model.config)
            reference = dataclasses.replace(reference, sampling=sampling)
            loop = asyncio.get_running_loop()
            with contextlib.ExitStack() as stack:
                paths, digests = await loop.run_in_executor(self._openers, self._open, stack, reference, owner)
                key = (digests, dataclasses.replace(reference, part="", urls=()))
                decode = functools.partial(self._decode, reference, paths)
                compute = functools.partial(self._encode_decoded, key, decode, encode)
                encoded, cached = await self._results.get((key, encode), compute)
        except ConfigError as error:
            raise ApiError(400, f"{place}: {error}", param=place) from error
        except ApiError as error:
            raise ApiError(
                error.status_code, error.detail.replace(FILE, place), param=place, code=error.code
            ) from error
        self._metrics.media.labels(encoded.prepared.report.kind, "cached" if cached else "encoded").inc()
        return RequestedMedia(encoded, make_info(place, encoded.prepared, cached=cached))

    def _open(
        self, stack: contextlib.ExitStack, reference: MediaReference, owner: str
    ) -> tuple[tuple[str, ...], tuple[bytes, ...]]:
        """Open the files of a reference, and return their paths and digests. Called in a thread."""
        paths = tuple(
            stack.enter_context(open_media_url(url, reference.part, self._options, self._uploads, owner))
            for url in reference.urls
        )
        return paths, tuple(map(digest_file, paths))

    async def _decode(self, reference: MediaReference, paths: tuple[str, ...]) -> PreparedMedia:
        job = DecodingJob(
            paths=paths,
            kind=reference.kind,
            is_frames=reference.is_frames,
            image_rate=reference.image_rate,
            sampling=reference.sampling,
            audio=reference.audio,
        )
        with self._metrics.decode_seconds.time():
            return await self._decoders.decode(job)

    async def _encode_decoded(
        self, key: Hashable, decode: Callable[[], Awaitable[PreparedMedia]], encode: Encode
    ) -> EncodedFile:
        prepared, _ = await self._decoded.get(key, decode)
        with self._metrics.encode_seconds.time():
            arrays = await asyncio.get_running_loop().run_in_executor(self._encoder, encode, prepared)
        return EncodedFile(dataclasses.replace(prepared, frames=None, mel=None), prepared.prompt_media, arrays)

    def _compile(self) -> None:
        config = self._model.config
        size, report = config.vit.image_size, MediaReport("", "video", 1, 0.0, "used")
        inputs = [{"frames": np.zeros((count, size, size, 3), np.float32)} for count in (1, config.num_frames)]
        if config.has_audio:
            audio = config.require_imagebind().audio
            inputs.append({"mel": np.zeros((config.num_clips, audio.num_mel_bins, audio.num_mel_frames), np.float32)})
        try:
            for arrays in inputs:
                self._encode(PreparedMedia(report, arrays.get("frames"), arrays.get("mel")))
        except Exception as error:  # of XLA, such as too little memory
            log_failure(error)
            raise

    def _encode(self, prepared: PreparedMedia) -> Sequence[np.ndarray]:
        return [np.asarray(tokens) for tokens in encode_media(self._model.network, prepared)]


def make_info(part: str, prepared: PreparedMedia, *, cached: bool) -> MediaInfo:
    """Return the report on a file for a response.

    Args:
        part: The field of the request that the file is from.
        prepared: What was read.
        cached: Whether it had been encoded before.
    """
    report = prepared.report
    return MediaInfo(
        part=part,
        kind=report.kind,
        summary=str(report),
        num_frames=report.num_frames,
        frame_times=[round(second, 3) for second in prepared.seconds],
        duration=round(report.duration, 3),
        audio=report.audio,
        audio_clip_times=[(round(start, 3), round(start + CLIP_SECONDS, 3)) for start in prepared.clip_starts],
        notes=list(report.notes),
        cached=cached,
    )
