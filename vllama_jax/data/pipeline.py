"""Records → batches: texts and labels, decoded and cropped pictures, sounds; padded, in order, ahead of the step.

Every host reads the texts of a whole global batch, to know the length that all pad to, and the media of its own rows.
Reading runs ahead of the step, in threads (io/prefetch.py) or processes (workers.py). A sample that cannot be used
keeps its row, without labels, so that no host's order shifts.
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
from vllama_jax.media.video import frame_indices
from vllama_jax.text.tokenizer import Tokenizer
from vllama_jax.text.training import TrainingText

MAX_TIMESTAMP = 9999.9  # a time in a prompt takes at most as many tokens as this
INSTRUCTION, CROP, FRAMES = range(3)  # what is drawn for a sample, each from a generator of its own


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """What one host feeds into a step, and what became of its samples.

    arrays: its rows of train/step.py's Batch. names: of each row's sample. problems: why rows are masked, by row.
    frames: pictures decoded.
    """

    arrays: dict[str, np.ndarray]
    names: list[str]
    problems: dict[int, str]
    frames: int


@dataclasses.dataclass(frozen=True)
class DecodedMedia:
    """One sample's media as the batch has it, or why there is none."""

    name: str
    media: np.ndarray | None
    timestamps: tuple[float, ...] = ()
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """Reads steps of a run. It holds no file open and no thread, so that it can be sent to another process.

    rows: which rows of the global batch this host has. caches: features to read in place of media, by dataset path.
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
        return self.read(self.sampler.rows(step))

    def read(self, rows: Rows) -> HostBatch:
        """This host's part of a batch of these rows."""
        stream = rows.stream
        longest = max(len(self._text(stream, *example, self._longest_times(stream)).ids) for example in rows.examples)
        mine = [rows.examples[row] for row in self.rows]
        decoded = self.decode_all(stream, mine)
        texts = [self._text(stream, *example, found.timestamps) for example, found in zip(mine, decoded, strict=True)]
        length = padded_length(longest, self.data.length_buckets)
        problems = {row: found.problem for row, found in enumerate(decoded) if found.problem}
        problems |= {
            row: "no label is left of its text"
            for row, text in enumerate(texts)
            if row not in problems and not (text.labels[:length] >= 0).any()
        }
        arrays = pad_texts(texts, length, self.num_media_tokens, masked=problems.keys())
        arrays[self.media_array_name(stream)] = self._stacked(stream, decoded)
        pictures = sum(len(found.media) for found in decoded if found.media is not None and stream.kind != "audio")
        return HostBatch(arrays, [found.name for found in decoded], problems, pictures)

    @property
    def num_media_tokens(self) -> int:
        """How many tokens of the language model a sample's media become."""
        return BRANCHES[self.branch].num_tokens(self.model)

    def media_array_name(self, stream: Stream) -> str:
        """Under which name a batch holds its media (train/step.py)."""
        if stream.dataset.path in self.caches:
            return "features"
        return MEDIA_ARRAYS[stream.kind]

    def _text(self, stream: Stream, record: int, epoch: int, timestamps: tuple[float, ...]) -> TrainingText:
        annotation = stream.records.annotation(record)
        draw = np.random.default_rng([*self._seed(stream, record), epoch, INSTRUCTION])
        text = stream.dataset.text
        text = dataclasses.replace(text, template=text.template or self.model.template)
        return encode_text(annotation, text, self.tokenizer, self.num_media_tokens, timestamps, draw)

    def _longest_times(self, stream: Stream) -> tuple[float, ...]:
        return (MAX_TIMESTAMP,) * self.model.num_frames if stream.kind == "video" else ()

    def decode_all(self, stream: Stream, examples: list[tuple[int, int]]) -> list[DecodedMedia]:
        """The media of samples (record, epoch), or what was kept of them; decoded side by side."""
        cfg = self.data
        threads = max(cfg.num_threads // max(cfg.num_workers, 1), 1)  # of each process
        return list(_pool(threads).map(lambda example: self._decode(stream, *example), examples))

    def _decode(self, stream: Stream, record: int, epoch: int) -> DecodedMedia:
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
        """A sample's pictures or sound; random frames and crops are drawn by (seed, record, variant).

        Raises MediaError for what cannot be used, DataError for a record that cannot be read.
        """
        name = stream.records.annotation(record).id
        seed = [*self._seed(stream, record), variant]
        draw = np.random.default_rng([*seed, CROP])
        with as_file(stream.records.media(record), name) as path:
            if stream.kind == "audio":
                return DecodedMedia(name, read_audio(path, self.model.num_clips).mel)
            if stream.kind == "image":
                return DecodedMedia(name, self._image(path, draw)[None])
            return self._video(path, name, stream, draw, seed)

    def _image(self, path: str, draw: np.random.Generator) -> np.ndarray:
        return read_image(path, self.image_size, choose_box=lambda height, width: self._box(draw, height, width))

    def _video(self, path: str, name: str, stream: Stream, draw: np.random.Generator, seed: list[int]) -> DecodedMedia:
        wanted = self.model.num_frames

        def sample_frames(total: int, num_frames: int) -> np.ndarray:
            if stream.dataset.frame_sampling == "uniform":
                return frame_indices(total, num_frames)
            return head_tail_indices(total, num_frames, np.random.default_rng([*seed, FRAMES]))

        video = read_video(path, wanted, self.image_size, audio=False, sample_frames=sample_frames)
        if len(video.frames) < wanted:
            raise MediaError(f"{name}: too short, {len(video.frames)} frames of the {wanted} that a sample takes")
        box = self._box(draw, self.image_size, self.image_size)
        return DecodedMedia(name, crop_frames(video.frames, box, self.image_size), tuple(video.timestamps))

    def _box(self, draw: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
        cfg = self.data
        if cfg.min_crop_area == 1:
            return 0, 0, height, width
        return random_crop_box(
            draw, height, width, (cfg.min_crop_area, 1.0), (1 / cfg.max_crop_aspect_ratio, cfg.max_crop_aspect_ratio)
        )

    @property
    def image_size(self) -> int:
        return BRANCHES[self.branch].frame_tower_config(self.model).image_size

    def _seed(self, stream: Stream, record: int) -> list[int]:
        return [self.seed, int(stream.records.digest[:8], 16), record]

    def _stacked(self, stream: Stream, decoded: list[DecodedMedia]) -> np.ndarray:
        """The media of all rows; zeros where there are none."""
        found = next((one.media for one in decoded if one.media is not None), None)
        shape, dtype = (found.shape, found.dtype) if found is not None else self._media_shape(stream)
        return np.stack([np.zeros(shape, dtype) if one.media is None else one.media for one in decoded])

    def _media_shape(self, stream: Stream) -> tuple[tuple[int, ...], Any]:
        if stream.dataset.path in self.caches:
            cache = self.caches[stream.dataset.path]
            return cache.shape(stream.kind), cache.dtype
        return BRANCHES[self.branch].media_shape(self.model, stream.kind), ARRAY_DTYPES[MEDIA_ARRAYS[stream.kind]]


def prefetch_batches(
    reader: Callable[[int], Any], first: int, last: int, cfg: DataConfig
) -> Generator[Any, None, None]:
    """What a reader has of steps first to last, read ahead in threads or processes. Its only state is the step.

    Close it to end the threads and processes before the last step. Raises VllamaError where a process was lost.
    """
    if cfg.num_workers:
        return map_in_processes(reader, range(first, last), cfg.num_workers, cfg.prefetch)
    return map_in_order(reader, range(first, last), cfg.prefetch + 1)  # with the one that is waited for


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """The threads that decode, one set in each process."""
    return concurrent.futures.ThreadPoolExecutor(threads)
