"""Precompute features: run the frozen encoders on every record of a run's datasets (data/feature_cache.py).

The shards of a cache are divided among the processes. Each process uses its own devices and waits for no other. A shard
is written as a partial file and renamed when it is complete, so that an interrupted command resumes at the next shard.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (registers "bfloat16" with numpy)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array
from orbax.checkpoint import multihost

from vllama_jax import sharding
from vllama_jax.branches import MEDIA_ARRAYS, find_branch
from vllama_jax.checkpoints.directory import ModelDirectory, open_model
from vllama_jax.checkpoints.restore import restore_weights
from vllama_jax.data.annotation import Kind
from vllama_jax.data.config import DatasetConfig
from vllama_jax.data.feature_cache import FeatureCache, find_cache_folder, open_cache_folder, pack_error, pack_features
from vllama_jax.data.pipeline import BatchReader, DecodedMedia, prefetch_batches
from vllama_jax.data.records import Records, open_records
from vllama_jax.data.sampling import BatchSampler, Stream, make_streams
from vllama_jax.errors import ConfigError, DataError, format_error
from vllama_jax.io.atomic import ensure_directory, move_file, scratch_directory, write_file, write_json
from vllama_jax.io.json_files import parse_object
from vllama_jax.nn.network import abstract_network
from vllama_jax.nn.video_llama import keep_components
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.feature_settings import compare_settings, describe_features
from vllama_jax.train.hosts import check_same_job
from vllama_jax.train.state import AbstractModel, Weights
from vllama_jax.train.step import compute_dtype, run_encoders

FEATURE_SHARD_BYTES = 512 * 2**20  # approximate size of a shard
SHARD_RECORDS = 4096  # at most; an interrupted shard is encoded again
# One entry in a group, because entries are read in random order. Features do not compress.
WRITER_OPTIONS = "group_size:1,uncompressed"
SYNC_TIMEOUT_SECONDS = 7 * 24 * 3600  # how long the first process waits for the last
STALE_FOLDER = re.compile(r"\.partial-(\d+)")

FeatureProgress = Callable[[float, float], None]


@dataclasses.dataclass(frozen=True)
class EncoderBatch:
    """A batch of cache entries to encode: of one shard and one kind of media.

    Attributes:
        cache: The feature cache.
        stream: The records of this kind in the dataset.
        shard: The number of the shard.
        entries: The number of each entry, which is record * variants + variant.
    """

    cache: FeatureCache
    stream: Stream
    shard: int
    entries: range

    @property
    def examples(self) -> list[tuple[int, int]]:
        """The record number and the variant of each entry."""
        return [divmod(entry, self.cache.variants) for entry in self.entries]


@dataclasses.dataclass(frozen=True)
class MediaDecoder:
    """A picklable decoder, which worker processes call with the number of a batch."""

    reader: BatchReader
    batches: list[EncoderBatch]

    def __call__(self, number: int) -> list[DecodedMedia]:
        """Decode the media of batch `number`."""
        batch = self.batches[number]
        return self.reader.decode_all(batch.stream, batch.examples)


@dataclasses.dataclass(frozen=True)
class PrecomputeResult:
    """The result of precomputing features, of one process.

    Attributes:
        records: Number of records encoded by this call.
        seconds: How long that took.
        shards: Number of shards of this process.
        num_existing_shards: How many of them were complete before.
        bytes: Size of the shards.
        skipped: The id of each record in them that cannot be decoded, and the reason.
    """

    records: int
    seconds: float
    num_shards: int
    num_existing_shards: int
    bytes: int
    skipped: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One shard of a cache, with the streams of its dataset in the order of records."""

    cache: FeatureCache
    streams: tuple[Stream, ...]
    number: int

    @property
    def path(self) -> Path:
        return self.cache.shard_path(self.number)

    @property
    def skipped_path(self) -> Path:
        return self.cache.shard_path(self.number, "skipped", "jsonl")

    @property
    def records(self) -> int:
        return len(self.cache.shard_range(self.number))

    def batches(self, sizes: dict[Kind, int]) -> Iterator[EncoderBatch]:
        """Divide the entries into batches, independent of earlier runs, so that a shard always has the same bytes."""
        variants, records = self.cache.variants, self.cache.shard_range(self.number)
        for stream in self.streams:
            first = max(records.start, stream.numbers.start) * variants
            last = min(records.stop, stream.numbers.stop) * variants
            for start in range(first, last, sizes[stream.kind]):
                yield EncoderBatch(self.cache, stream, self.number, range(start, min(start + sizes[stream.kind], last)))


def precompute_features(
    config: TrainConfig,
    out: Path,
    base: str = "",
    shard_records: int = 0,
    progress: FeatureProgress = lambda done, all: None,
) -> PrecomputeResult:
    """Precompute the features of a run's datasets: this process's shards that `out` does not contain yet.

    Args:
        config: The run config.
        out: The directory of the caches, `data.feature_cache` of the runs that read them.
        base: The base model directory, if it is no longer at `config.model`.
        shard_records: Records in a shard. 0 chooses it for shards of about 512 MB.
        progress: Called with the number of records done and the number of all.

    Returns:
        The counts and sizes of this process's shards.

    Raises:
        ConfigError: `out` contains features that were computed with other settings.
        DataError: `out` cannot be written, or none of the records can be decoded.
        CheckpointError: The model cannot be read.
    """
    check_same_job(config, out)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, variants=config.data.variants or 1))
    _check_out(out)
    directory = open_model(base or config.model)
    find_branch(config.branch).require(directory.config, str(directory.path))
    opened = [(dataset, open_records(dataset.path)) for dataset in config.datasets]
    streams = make_streams(opened, config.branch)
    reader = BatchReader(
        config.data,
        config.branch,
        config.seed,
        directory.config,
        directory.tokenizer,
        BatchSampler(streams, 1, 1, config.seed),
        (),
    )
    with _scratch_folder(out) as scratch:
        caches = {}
        for dataset, records in opened:
            manifest = _make_manifest(config, directory, dataset, records)
            cache = _open_or_create(find_cache_folder(out, records), scratch, manifest, shard_records)
            caches[cache.path] = cache, tuple(stream for stream in streams if stream.records is records)
        all_shards = [_Shard(*found, number) for found in caches.values() for number in range(found[0].num_shards)]
        process, processes = _processes()
        own_shards = all_shards[process::processes]
        missing_shards = [shard for shard in own_shards if not shard.cache.is_complete(shard.number)]
        start_time = time.perf_counter()
        if missing_shards:
            _encode(config, reader, directory, all_shards, missing_shards, scratch, progress)
        seconds = time.perf_counter() - start_time
    _wait_for_other_processes()
    return _summarize(own_shards, missing_shards, seconds)


def _encode(
    config: TrainConfig,
    reader: BatchReader,
    directory: ModelDirectory,
    all_shards: list[_Shard],
    missing_shards: list[_Shard],
    scratch: Path,
    progress: FeatureProgress,
) -> None:
    """Encode and write shards. Decoding and writing overlap with the encoders."""
    encoder = load_encoder(config, directory, {stream.kind for shard in all_shards for stream in shard.streams})
    sizes = _choose_batch_sizes(config, all_shards)
    work = [(shard, batch) for shard in missing_shards for batch in shard.batches(sizes)]
    decoded_batches = prefetch_batches(MediaDecoder(reader, [batch for _, batch in work]), 0, len(work), config.data)
    all_records, done = sum(shard.records for shard in missing_shards), 0.0
    file, pending = None, []
    with contextlib.closing(decoded_batches):
        for number in range(len(work) + 1):
            if number < len(work):
                decoded = next(decoded_batches)
                kind = work[number][1].stream.kind
                pending.append((*work[number], decoded, encoder(kind, _pad_batch(decoded, sizes[kind]))))
            if number:
                shard, batch, decoded, features = pending.pop(0)
                file = file or _ShardFile(shard, scratch)
                file.add(batch, decoded, np.empty(0) if features is None else np.asarray(features))
                done += len(batch.entries) / shard.cache.variants
                progress(done, all_records)
                if file.is_complete:
                    file.finish()
                    file = None


class _ShardFile:
    """A shard that is being written: a partial file until it is complete."""

    def __init__(self, shard: _Shard, scratch: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._shard = shard
        self._path = scratch / shard.path.name
        self._writer = ArrayRecordWriter(str(self._path), WRITER_OPTIONS)
        self._left = shard.cache.entries(shard.number)
        self._skipped: list[dict[str, Any]] = []

    @property
    def is_complete(self) -> bool:
        return self._left == 0

    def add(self, batch: EncoderBatch, decoded: list[DecodedMedia], features: np.ndarray) -> None:
        """Write the entries of a batch.

        Args:
            batch: The entries.
            decoded: The decoded media of each entry, or why it cannot be decoded.
            features: [rows, …]; rows beyond the batch are padding. Empty if none of the entries can be decoded.
        """
        for row, (found, (record, variant)) in enumerate(zip(decoded, batch.examples, strict=True)):
            if found.problem:
                self._skipped.append({"record": record, "variant": variant, "id": found.name, "why": found.problem})
                self._write(pack_error(found.problem))
            else:
                self._write(pack_features(features[row], found.timestamps))
        self._left -= len(decoded)

    def finish(self) -> None:
        """Sync the shard to disk and rename it to its final name. Raise DataError if it cannot be written."""
        with self._translate_errors():
            self._writer.close()
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        lines = "".join(json.dumps(line) + "\n" for line in self._skipped)
        if lines:
            partial = self._path.with_suffix(".jsonl")
            write_file(partial, lines.encode())
            move_file(partial, self._shard.skipped_path)
        else:
            self._shard.skipped_path.unlink(missing_ok=True)
        move_file(self._path, self._shard.path)

    def _write(self, entry: bytes) -> None:
        with self._translate_errors():
            self._writer.write(entry)

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # a full disk
            raise DataError(
                f"{self._shard.path}: cannot be written ({format_error(error)}); complete shards are kept"
            ) from error


def load_encoder(
    config: TrainConfig, directory: ModelDirectory, kinds: Collection[Kind]
) -> Callable[[Kind, np.ndarray | None], Array | None]:
    """Load a branch's frozen encoders and return a function that runs them.

    Args:
        config: The run config.
        directory: The base model.
        kinds: The kinds of media to encode.

    Returns:
        A function (kind, media [b, …]) → features [b, …] in the compute dtype, which does not wait for the result. It
        returns None if media is None. The batch is sharded over this process's devices and the parameters are
        replicated: they are small compared with a language model's, and no layer has to be gathered.
    """
    mesh = sharding.make_mesh(jax.local_device_count(), devices=jax.local_devices())
    dtype = compute_dtype(config)
    network = abstract_network(directory.config, dtype.name)
    keep_components(network, set(find_branch(config.branch).encoder_components(kinds)))
    abstract_model = AbstractModel(network)
    wanted = {
        path: jax.ShapeDtypeStruct(abstract_model.variables[path].shape, dtype, sharding=place)
        for path, place in abstract_model.shardings(abstract_model.variables, mesh).items()
    }
    weights = restore_weights(directory, wanted)
    rows = NamedSharding(mesh, PartitionSpec(sharding.MESH_AXES["batch"]))

    @jax.jit
    def run(weights: Weights, batch: dict[str, Array]) -> Array:
        return run_encoders(abstract_model.build(weights), config.branch, batch).astype(dtype)

    def encoder(kind: Kind, media: np.ndarray | None) -> Array | None:
        if media is None:
            return None
        with sharding.use_mesh(mesh):
            return run(weights, {MEDIA_ARRAYS[kind]: jax.device_put(media, rows)})

    return encoder


def _choose_batch_sizes(config: TrainConfig, all_shards: list[_Shard]) -> dict[Kind, int]:
    """Choose the batch size for each kind of media: this process's rows of a micro-batch, or fewer for small shards."""
    devices = jax.local_device_count()
    micro_batch = config.batch_size // config.grad_accum_steps / jax.process_count()
    sizes: dict[Kind, int] = {}
    for shard in all_shards:
        for stream in shard.streams:
            entries = min(len(stream.numbers), shard.cache.shard_records) * shard.cache.variants
            rows = math.ceil(min(micro_batch, entries) / devices) * devices
            sizes[stream.kind] = max(sizes.get(stream.kind, 0), rows)
    return sizes


def _pad_batch(decoded: list[DecodedMedia], size: int) -> np.ndarray | None:
    """Stack media to [size, …] with zeros in rows without media. Return None if no row has any."""
    first = next((entry.media for entry in decoded if entry.media is not None), None)
    if first is None:
        return None
    rows = np.zeros((size, *first.shape), first.dtype)
    for row, entry in zip(rows, decoded, strict=False):
        if entry.media is not None:
            row[...] = entry.media
    return rows


def _make_manifest(
    config: TrainConfig, directory: ModelDirectory, dataset: DatasetConfig, records: Records
) -> dict[str, Any]:
    """Make the manifest of a dataset's features, with the default number of records in a shard."""
    settings = describe_features(config, directory, dataset, records)
    itemsize = compute_dtype(config).itemsize
    entry = max(math.prod(shape) for shape in settings["shapes"].values()) * itemsize
    fit = min(FEATURE_SHARD_BYTES // (entry * settings["variants"]), SHARD_RECORDS, len(records))
    rows = config.batch_size // config.grad_accum_steps
    return {**settings, "shard_records": max(fit // rows * rows or fit, 1)}


def _open_or_create(folder: Path, scratch: Path, manifest: dict[str, Any], shard_records: int) -> FeatureCache:
    """Open the cache in a folder, or create it. Raise ConfigError if it was computed with other settings."""
    if not (folder / "manifest.json").exists():  # other processes may write the same at the same time
        ensure_directory(folder)
        write_json(scratch / "manifest.json", manifest | ({"shard_records": shard_records} if shard_records else {}))
        move_file(scratch / "manifest.json", folder / "manifest.json")
    cache, recorded = open_cache_folder(folder)
    wanted = {**manifest, "shard_records": shard_records or cache.shard_records}
    if changed := compare_settings(recorded, wanted):
        raise ConfigError(
            f"{folder}: contains features computed with other settings ({'; '.join(changed)}); "
            "use the same settings, or choose another --out"
        )
    return cache


def _check_out(out: Path) -> None:
    """Raise DataError if `out` is a directory of another type."""
    if unexpected := next((name for name in ("config.json", "manifest.json") if (out / name).exists()), None):
        raise DataError(f"{out}: not a feature cache (it has {unexpected}); choose another --out")


@contextlib.contextmanager
def _scratch_folder(out: Path) -> Iterator[Path]:
    """Create a folder in `out` for this process's partial files, and remove it at the end."""
    process = jax.process_index()
    folder = out / f".partial-{process}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for stale in out.glob(".partial-*") if process == 0 else ():  # left by a killed run with more processes
            if (found := STALE_FOLDER.fullmatch(stale.name)) and int(found[1]) >= jax.process_count():
                shutil.rmtree(stale, ignore_errors=True)
        busy_message = f"{out}: another process is writing features there; wait for it, or choose another --out"
        with scratch_directory(folder, busy_message) as scratch:
            yield scratch
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error}); complete shards are kept") from error


def _processes() -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    return jax.process_index(), jax.process_count()


def _wait_for_other_processes() -> None:
    """Wait for all processes, without devices. JAX ends all processes if one of them exits before the others."""
    everyone = set(range(jax.process_count()))
    multihost.sync_global_processes("vllama features", timeout=SYNC_TIMEOUT_SECONDS, processes=everyone)


def _read_skipped(path: Path) -> Iterator[dict[str, Any]]:
    """Read the lines of a skipped-*.jsonl file. Raise DataError if it is corrupt."""
    advice = (
        f"remove it and {path.name.replace('skipped', 'features').replace('.jsonl', '.array_record')}, and run again"
    )
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({format_error(error)}); {advice}") from error
    for number, line in enumerate(lines, 1):
        fields = parse_object(line, f"{path}, line {number}", DataError, advice)
        if not (isinstance(fields.get("record"), int) and all(isinstance(fields.get(n), str) for n in ("id", "why"))):
            raise DataError(f"{path}, line {number}: has no record, id and why; {advice}")
        yield fields


def _summarize(own_shards: list[_Shard], missing_shards: list[_Shard], seconds: float) -> PrecomputeResult:
    skipped = {}
    for shard in own_shards:
        if shard.skipped_path.exists():
            for line in _read_skipped(shard.skipped_path):
                skipped[shard.path.parent, line["record"]] = line["id"], line["why"]
    if skipped and len(skipped) == sum(shard.records for shard in own_shards):
        raise DataError(f"none of {len(skipped)} records can be decoded; the first: {': '.join(min(skipped.values()))}")
    return PrecomputeResult(
        records=sum(shard.records for shard in missing_shards),
        seconds=seconds,
        num_shards=len(own_shards),
        num_existing_shards=len(own_shards) - len(missing_shards),
        bytes=sum(shard.path.stat().st_size for shard in own_shards),
        skipped=list(skipped.values()),
    )
