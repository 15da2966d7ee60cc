"""Compute features of media files in batches: `embed_files`."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllama_jax.branches import BRANCHES
from vllama_jax.checkpoints.directory import ModelDirectory, open_model
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.embed.outputs import FEATURES, Feature, Output, select_outputs
from vllama_jax.errors import ConfigError, MediaError
from vllama_jax.io.prefetch import map_in_order
from vllama_jax.media import MediaReport
from vllama_jax.media_tokens import check_num_frames, prepare_media
from vllama_jax.model import Model, remove_missing_branches

if TYPE_CHECKING:
    import jax

    from vllama_jax.nn.video_llama import VideoLlama

DECODING_THREADS = 8

_Decoded = tuple["FileFeatures", dict[str, np.ndarray]]  # without its arrays, and the arrays to encode
_Rows = tuple[str, "jax.Array", "dict[int, Any]"]  # an output's name, its rows, and the index of each file in them


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Options of `embed_files`.

    Attributes:
        features: The features to compute, of `frames`, `qformer`, `tokens` and `imagebind`; by default all that the
            model has.
        num_frames: The number of frames to sample from a video; by default the model's.
        audio: Whether to use the audio of videos.
        batch_size: The number of frames or audio clips that an encoder processes at a time.

    Raises:
        ConfigError: A number is below 1, or there is no such feature.
    """

    features: tuple[Feature, ...] = ()
    num_frames: int | None = None
    audio: bool = True
    batch_size: int = 64

    def __post_init__(self) -> None:
        if unknown := [feature for feature in self.features if feature not in FEATURES]:
            raise ConfigError(f"features: {unknown[0]!r} is not one of {', '.join(FEATURES)}")
        for name in ("num_frames", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")


@dataclasses.dataclass(frozen=True)
class FileFeatures:
    """The features of a media file.

    Attributes:
        file: The path.
        report: What the file contains and what of it is used; None if the file cannot be used.
        error: Why the file cannot be used; empty if it can.
        timestamps: Times of a video's frames, in seconds.
        clip_starts: Starts of the audio clips of 2 seconds, in seconds since the first sample of the audio.
        arrays: float32 arrays by name, those that the file has: `frames` [t, q, d], `imagebind_image` [t, e],
            `imagebind_audio` [s, e], `video_qformer` and `audio_qformer` [q, d], `video_tokens` and `audio_tokens`
            [q, w], for t frames and s audio clips.
    """

    file: str
    report: MediaReport | None = None
    error: str = ""
    timestamps: tuple[float, ...] = ()
    clip_starts: tuple[float, ...] = ()
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def load_encoders(
    path: str | Path | ModelDirectory, features: Sequence[Feature] = (), dtype: str | None = None
) -> Model:
    """Load a model without its language model, and without the components that `features` do not need.

    Args:
        path: A model or run directory, or a `ModelDirectory` from `open_model`.
        features: The features to compute; by default all that the model has.
        dtype: Dtype of the weights and of the computation; by default float32 on CPUs and bfloat16 elsewhere.

    Raises:
        CheckpointError: The directory is not a model or run directory, or is incomplete or corrupt.
        ConfigError: Its config is invalid, or the model does not have one of the features.
    """
    from flax import nnx

    from vllama_jax.checkpoints.quantize import make_network_to_load
    from vllama_jax.checkpoints.restore import restore
    from vllama_jax.nn.video_llama import keep_components
    from vllama_jax.runtime.compilation_cache import enable_compilation_cache

    directory = remove_missing_branches(path if isinstance(path, ModelDirectory) else open_model(path))
    outputs = select_outputs(directory.config, features)
    enable_compilation_cache()
    network, _ = make_network_to_load(directory, dtype, None)
    keep_components(network, set().union(*(output.components for output in outputs)))
    graph, abstract = nnx.split(network)
    return Model(directory.config, directory.tokenizer, nnx.merge(graph, restore(directory, abstract)))


def embed_files(model: Model, files: Iterable[str | Path], **options: Any) -> Iterator[FileFeatures]:
    """Compute features of media files in batches. Files are decoded while others are encoded.

    ImageBind's vectors of frames and of audio clips are in one space: their cosine similarities are meaningful, also
    between an image and audio. The norm of a vector is not: it is 1 for frames and 20 for audio (docs/embeddings.md).

    Args:
        model: A model from `load`, or from `load_encoders`, which needs less memory.
        files: Video, image and audio files.
        **options: Fields of `EmbedOptions`, such as `features` and `batch_size`.

    Yields:
        The features of each file, in order. A file that cannot be used has an `error` and no arrays.

    Raises:
        ConfigError: An option is invalid, or the model does not have one of the features.

    Example:
        >>> import vllama_jax as vl
        >>> from vllama_jax.checkpoints.shipped import find_clip
        >>> (found,) = vl.embed_files(vl.load("miniature"), [find_clip("demo")], features=("imagebind",))
        >>> sorted(found.arrays)
        ['imagebind_audio', 'imagebind_image']
        >>> len(found.arrays["imagebind_image"]) == len(found.timestamps)
        True
    """
    chosen = EmbedOptions(**options)
    outputs = select_outputs(model.config, chosen.features)
    check_options(model.config, outputs, chosen)
    return _embed_files(model, files, outputs, chosen)


def check_options(config: VideoLlamaConfig, outputs: Sequence[Output], options: EmbedOptions) -> None:
    """Raise ConfigError if a Q-Former is needed and has fewer frame positions than frames are sampled."""
    if any(output.stage != "encoder" for output in outputs):
        advice = "use fewer frames, or only the features frames and imagebind"
        check_num_frames(config, "num_frames", options.num_frames, advice)


def _embed_files(
    model: Model, files: Iterable[str | Path], outputs: Sequence[Output], options: EmbedOptions
) -> Generator[FileFeatures, None, None]:
    read = functools.partial(_read_file, config=model.config, outputs=outputs, options=options)
    decoded = map_in_order(read, files, num_threads=min(DECODING_THREADS, os.cpu_count() or 1))
    collect: Callable[[], list[FileFeatures]] = list
    with contextlib.closing(decoded):
        for batch in _make_batches(decoded, options.batch_size):
            next_collect = _start_encoding(model.network, batch, outputs, options.batch_size)
            yield from collect()  # of the previous batch, after the devices have the next one
            collect = next_collect
        yield from collect()


def _read_file(
    file: str | Path, config: VideoLlamaConfig, outputs: Sequence[Output], options: EmbedOptions
) -> _Decoded:
    """Return a file's record without arrays, and the arrays to encode: frames [t, h, w, 3], mel [s, 128, 204]."""
    name = os.fspath(file)
    try:
        prepared = prepare_media(file, config, num_frames=options.num_frames, audio=options.audio)
    except MediaError as error:
        return FileFeatures(name, error=str(error)), {}
    wanted = {output.array for output in outputs}
    arrays = {name: array for name, array in prepared.arrays.items() if name in wanted}
    if not arrays:
        features = ", ".join(dict.fromkeys(output.feature for output in outputs))
        return FileFeatures(name, error=f"{name}: only audio, which has no {features}; choose other features"), {}
    return FileFeatures(name, prepared.report, "", prepared.seconds, prepared.clip_starts), arrays


def _make_batches(decoded: Iterable[_Decoded], size: int) -> Iterator[list[_Decoded]]:
    """Group consecutive files so that a batch has at most `size` frames and `size` audio clips.

    A file that has more is a batch of its own.
    """
    batch: list[_Decoded] = []
    counts: dict[str, int] = {}
    for record, arrays in decoded:
        extended = {name: counts.get(name, 0) + len(array) for name, array in arrays.items()}
        if batch and max(len(batch) + 1, *extended.values(), 0) > size:
            yield batch
            batch, extended = [], {name: len(array) for name, array in arrays.items()}
            counts = {}
        batch.append((record, arrays))
        counts |= extended
    if batch:
        yield batch


def _start_encoding(
    network: "VideoLlama", batch: Sequence[_Decoded], outputs: Sequence[Output], size: int
) -> Callable[[], list[FileFeatures]]:
    """Start to encode a batch, and return a function that waits for the results."""
    from vllama_jax.sharding import get_mesh, use_mesh

    pending: list[_Rows] = []
    with use_mesh(get_mesh(network)):
        for name in ("frames", "mel"):
            arrays = {number: arrays[name] for number, (_, arrays) in enumerate(batch) if name in arrays}
            if arrays:
                chosen = [output for output in outputs if output.array == name]
                pending += _encode_arrays(network, arrays, chosen, size)

    def collect() -> list[FileFeatures]:
        found: list[dict[str, np.ndarray]] = [{} for _ in batch]
        for name, array, rows in pending:
            on_host = np.asarray(array, np.float32)
            for number, row in rows.items():
                found[number][name] = on_host[row]
        return [dataclasses.replace(record, arrays=arrays) for (record, _), arrays in zip(batch, found, strict=True)]

    return collect


def _encode_arrays(
    network: "VideoLlama", arrays: dict[int, np.ndarray], outputs: Sequence[Output], size: int
) -> Iterator[_Rows]:
    """Encode the frames or spectrograms of several files.

    Args:
        network: The network.
        arrays: The frames [t, h, w, 3] or spectrograms [s, f, m] of each file, by its number in the batch.
        outputs: The outputs to compute from them.
        size: The largest number of frames or spectrograms that an encoder processes at a time.

    Yields:
        Outputs with the rows of each file.
    """
    chunks = _make_chunks(np.concatenate(list(arrays.values())), size)
    branches = tuple(dict.fromkeys(output.branch for output in outputs))
    encoded = _compile_encoders(branches, outputs[0].array)(network, chunks)
    ends = np.cumsum([len(array) for array in arrays.values()]).tolist()
    spans = {number: slice(end - len(arrays[number]), end) for number, end in zip(arrays, ends, strict=True)}
    yield from ((output.name, encoded[output.branch], spans) for output in outputs if output.stage == "encoder")

    heads = tuple(output for output in outputs if output.stage != "encoder")
    for length in dict.fromkeys(map(len, arrays.values())) if heads else ():
        rows = {number: row for row, number in enumerate(n for n in arrays if len(arrays[n]) == length)}
        starts = np.zeros(chunks.shape[0] * chunks.shape[1] // length, np.int32)
        starts[: len(rows)] = [spans[number].start for number in rows]
        computed = _compile_heads(heads)(network, encoded, starts[:, None] + np.arange(length, dtype=np.int32))
        yield from ((name, array, rows) for name, array in computed.items())


def _make_chunks(items: np.ndarray, size: int) -> np.ndarray:
    """Divide items [n, …] into chunks [c, b, …] for `b` at most `size`, with zeros as padding.

    Fewer items than `size` are padded to a power of two, so that there are few shapes to compile for.
    """
    rows = min(size, 1 << (len(items) - 1).bit_length())
    padding = np.zeros((-len(items) % rows, *items.shape[1:]), items.dtype)
    return np.concatenate([items, padding]).reshape(-1, rows, *items.shape[1:])


@functools.cache
def _compile_encoders(
    branches: tuple[str, ...], array: str
) -> "Callable[[VideoLlama, np.ndarray], dict[str, jax.Array]]":
    """Compile the encoders of branches: chunks [c, b, …] → features [c * b, *feature_shape] by branch."""
    import jax

    encoders = {name: BRANCHES[name].encoders[array] for name in branches}

    def encode(network: "VideoLlama", chunks: "jax.Array") -> "dict[str, jax.Array]":
        def encode_chunk(chunk: "jax.Array") -> "dict[str, jax.Array]":
            return {name: encoder.encode(network, chunk[:, None])[:, 0] for name, encoder in encoders.items()}

        encoded = jax.lax.map(encode_chunk, chunks)
        return {name: features.reshape(-1, *features.shape[2:]) for name, features in encoded.items()}

    return jax.jit(encode)


@functools.cache
def _compile_heads(
    outputs: tuple[Output, ...],
) -> "Callable[[VideoLlama, dict[str, jax.Array], np.ndarray], dict[str, jax.Array]]":
    """Compile outputs of Q-Formers: features by branch, and their rows [n, t] for n files → arrays [n, *row_shape]."""
    import jax

    def compute(network: "VideoLlama", encoded: "dict[str, jax.Array]", rows: "jax.Array") -> "dict[str, jax.Array]":
        return {output.name: output.compute(network, encoded[output.branch][rows]) for output in outputs}

    return jax.jit(compute)
