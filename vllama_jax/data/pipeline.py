"""Convert records to batches: tokenize texts, decode and crop media, pad, in order and ahead of the training step.

Every host reads its own rows, and pads them to the length that they need. `train/batch_exchange.py` extends them to the
length of the global batch. Reading runs ahead of the step in threads (io/prefetch.py) or worker processes (workers.py).
An unusable example keeps its row, without labels, so that the order of records stays the same on all hosts.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from vllama_jax.branches import ARRAY_DTYPES, BRANCHES, MEDIA_ARRAYS
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.data.config import DataConfig
from vllama_jax.data.feature_cache import FeatureCache
from vllama_jax.data.sampling import BatchSampler, Rows, Stream
from vllama_jax.data.tokenization import encode_text, pad_texts, padded_length
from vllama_jax.data.workers import map_in_processes
from vllama_jax.errors import DataError, MediaError
from vllama_jax.io.prefetch import map_in_order
from vllama_jax.media import as_file, read_audio, read_image, read_video
from vllama_jax.media.augment import crop_frames, head_tail_indices, random_crop_box
from vllama_jax.media.frame_sampling import frame_indices
from vllama_jax.text.tokenizer import Tokenizer
from vllama_jax.text.training import TrainingText

MAX_TIMESTAMP = 9999.9  # seconds; no timestamp in a prompt takes more tokens than this one
INSTRUCTION, CROP, FRAMES = range(3)  # random choices for an example, each with its own generator


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """One host's rows of a batch.

    Attributes:
        arrays: The host's rows of the Batch of train/step.py.
        names: The media file of each row, as its annotation names it.
        problems: Reasons why rows are masked, by row.
        frames: Number of frames read, including those in cached features.
        remote_problems: (media file, reason) of the masked rows of other hosts. Only process 0 has them.
    """

    arrays: dict[str, np.ndarray]
    names: list[str]
    problems: dict[int, str]
    frames: int
    remote_problems: tuple[tuple[str, str], ...] = ()

    @property
    def masked(self) -> list[tuple[str, str]]:
        """(media file, reason) of each masked row: of this host's rows, and in process 0 of all rows."""
        return [*((self.names[row], why) for row, why in self.problems.items()), *self.remote_problems]


@dataclasses.dataclass(frozen=True)
class DecodedMedia:
    """The decoded media or cached features of one example.

    Attributes:
        name: The media file, as the annotation names it.
        media: Frames uint8 [t, h, w, 3], log-mel clips float32 [s, 128, 204] or features; None if decoding failed.
        timestamps: Of a video's frames, in seconds.
        problem: Why decoding failed; "" if it did not.
    """

    name: str
    media: np.ndarray | None
    timestamps: tuple[float, ...] = ()
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """Reads the batches of a run: call it with the number of a step.

    It holds no open file and no thread, so it can be sent to another process.

    Attributes:
        data: How records become batches.
        branch: The branch that is trained.
        seed: The run's seed.
        model: The model's config.
        tokenizer: The model's tokenizer.
        sampler: Chooses the records of each step.
        rows: The rows of the global batch that belong to this host.
        caches: Feature caches to read in place of media, by dataset path.
    """

    data: DataConfig
    branch: str
    seed: int
    model: VideoLlamaConfig
    tokenizer: Tokenizer
    sampler: BatchSampler
    rows: Sequence[int]
    caches: Mapping[str, FeatureCache] = dataclasses.field(default_factory=dict)

    def __call__(self, step: int) -> HostBatch:
        """Read this host's rows of a step."""
        return self.read(self.sampler.rows(step))

    def read(self, rows: Rows) -> HostBatch:
        """Read this host's rows of a global batch, padded to the length that these rows need."""
        stream = rows.stream
        examples = [rows.examples[row] for row in self.rows]
        longest = max(
            len(self._encode_text(stream, *example, self._longest_timestamps(stream)).ids) for example in examples
        )
        decoded = self.decode_all(stream, examples)
        texts = [
            self._encode_text(stream, *example, item.timestamps)
            for example, item in zip(examples, decoded, strict=True)
        ]
        length = padded_length(longest, self.data.length_buckets)
        problems = {row: item.problem for row, item in enumerate(decoded) if item.problem}
        problems |= {
            row: "its text has no labels"
            for row, text in enumerate(texts)
            if row not in problems and not (text.labels[:length] >= 0).any()
        }
        arrays = pad_texts(texts, length, self.num_media_tokens, masked=problems.keys())
        arrays[self.media_array_name(stream)] = self._stack_media(stream, decoded)
        num_frames = sum(len(item.media) for item in decoded if item.media is not None and stream.kind != "audio")
        return HostBatch(arrays, [item.name for item in decoded], problems, num_frames)

    @property
    def num_media_tokens(self) -> int:
        """The number of media tokens of an example."""
        return BRANCHES[self.branch].num_tokens(self.model)

    def media_array_name(self, stream: Stream) -> str:
        """Return the name of a batch's media array: "frames", "mel" or "features" (train/step.py)."""
        if stream.dataset.path in self.caches:
            return "features"
        return MEDIA_ARRAYS[stream.kind]

    def _encode_text(self, stream: Stream, record: int, epoch: int, timestamps: tuple[float, ...]) -> TrainingText:
        annotation = stream.records.annotation(record)
        rng = np.random.default_rng([*self._seed(stream, record), epoch, INSTRUCTION])
        text = stream.dataset.text
        text = dataclasses.replace(text, template=text.template or self.model.template)
        return encode_text(annotation, text, self.tokenizer, self.num_media_tokens, timestamps, rng)

    def _longest_timestamps(self, stream: Stream) -> tuple[float, ...]:
        return (MAX_TIMESTAMP,) * self.model.num_frames if stream.kind == "video" else ()

    def decode_all(self, stream: Stream, examples: list[tuple[int, int]]) -> list[DecodedMedia]:
        """Decode examples, given as (record, epoch), in parallel threads, or read their features from a cache."""
        cfg = self.data
        threads = max(cfg.num_threads // max(cfg.num_workers, 1), 1)  # of each process
        return list(_thread_pool(threads).map(lambda example: self._try_decode(stream, *example), examples))

    def _try_decode(self, stream: Stream, record: int, epoch: int) -> DecodedMedia:
        cache = self.caches.get(stream.dataset.path)
        variants = self.data.variants or (cache.variants if cache else 0)
        name = stream.records.annotation(record).id
        try:
            variant = epoch % variants if variants else epoch
            if cache:
                return DecodedMedia(name, *cache.read(record, variant))
            return self.decode(stream, record, variant)
        except (MediaError, DataError) as error:
            return DecodedMedia(name, None, problem=str(error))

    def decode(self, stream: Stream, record: int, variant: int) -> DecodedMedia:
        """Decode the media of a record.

        Args:
            stream: The stream of the record.
            record: The record number.
            variant: Random frames and crops depend on (seed, record, variant).

        Returns:
            Frames or log-mel clips, and timestamps of a video.

        Raises:
            MediaError: The media cannot be decoded, or a video is too short.
            DataError: The record cannot be read.
        """
        name = stream.records.annotation(record).id
        seed = [*self._seed(stream, record), variant]
        rng = np.random.default_rng([*seed, CROP])
        with as_file(stream.records.media(record), name) as path:
            if stream.kind == "audio":
                return DecodedMedia(name, read_audio(path, self.model.num_clips).mel)
            if stream.kind == "image":
                return DecodedMedia(name, self._read_image(path, rng)[None])
            return self._read_video(path, name, stream, rng, seed)

    def _read_image(self, path: str, rng: np.random.Generator) -> np.ndarray:
        return read_image(
            path, self.image_size, choose_box=lambda height, width: self._draw_crop_box(rng, height, width)
        )

    def _read_video(
        self, path: str, name: str, stream: Stream, rng: np.random.Generator, seed: list[int]
    ) -> DecodedMedia:
        expected = self.model.num_frames

        def sample_frames(total: int, num_frames: int) -> np.ndarray:
            if stream.dataset.frame_sampling == "uniform":
                return frame_indices(total, num_frames)
            return head_tail_indices(total, num_frames, np.random.default_rng([*seed, FRAMES]))

        video = read_video(path, expected, self.image_size, audio=False, sample_frames=sample_frames)
        if len(video.frames) < expected:
            raise MediaError(f"{name}: too short, {len(video.frames)} frames of {expected}")
        box = self._draw_crop_box(rng, self.image_size, self.image_size)
        return DecodedMedia(name, crop_frames(video.frames, box, self.image_size), tuple(video.timestamps))

    def _draw_crop_box(self, rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
        cfg = self.data
        if cfg.min_crop_area == 1:
            return 0, 0, height, width
        ratio = cfg.max_crop_aspect_ratio
        return random_crop_box(rng, height, width, (cfg.min_crop_area, 1.0), (1 / ratio, ratio))

    @property
    def image_size(self) -> int:
        """The height and width of frames, in pixels."""
        return BRANCHES[self.branch].frame_tower_config(self.model).image_size

    def _seed(self, stream: Stream, record: int) -> list[int]:
        return [self.seed, int(stream.records.digest[:8], 16), record]

    def _stack_media(self, stream: Stream, decoded: list[DecodedMedia]) -> np.ndarray:
        """Stack the media of all rows, with zeros for rows without media."""
        first = next((row.media for row in decoded if row.media is not None), None)
        shape, dtype = (first.shape, first.dtype) if first is not None else self._media_shape(stream)
        return np.stack([np.zeros(shape, dtype) if row.media is None else row.media for row in decoded])

    def _media_shape(self, stream: Stream) -> tuple[tuple[int, ...], Any]:
        if stream.dataset.path in self.caches:
            cache = self.caches[stream.dataset.path]
            return cache.shape(stream.kind), cache.dtype
        return BRANCHES[self.branch].media_shape(self.model, stream.kind), ARRAY_DTYPES[MEDIA_ARRAYS[stream.kind]]


def prefetch_batches(
    reader: Callable[[int], Any],
    first: int,
    last: int,
    cfg: DataConfig,
    finish: Callable[[int, Callable[[], Any]], Any] = lambda step, read: read(),
) -> Generator[Any, None, None]:
    """Read the batches of steps `first` to `last` - 1 ahead of time, in threads or worker processes.

    The only state is the number of the step. Close the generator to end threads and processes before the last step.

    Args:
        reader: Called with the number of a step, such as a `BatchReader`.
        first: The first step.
        last: The step after the last one.
        cfg: Numbers of worker processes and of batches to prefetch.
        finish: Called in threads of this process with the number of a step and a function that returns the result of
            `reader`, such as `BatchExchange.read`. It returns the final result.

    Yields:
        The results of `finish`, in order.

    Raises:
        VllamaError: A worker process ended.
    """
    if cfg.num_workers:
        return map_in_processes(reader, range(first, last), cfg.num_workers, cfg.prefetch, finish)

    def read(step: int) -> Any:
        return finish(step, lambda: reader(step))

    return map_in_order(read, range(first, last), cfg.prefetch + 1)  # the caller waits for one of them


@functools.cache
def _thread_pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """Create the decoding threads of this process, once."""
    return concurrent.futures.ThreadPoolExecutor(threads)
