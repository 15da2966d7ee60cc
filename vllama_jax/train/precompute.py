"""Writes feature caches (data/feature_cache.py): every record of a run's datasets through the frozen encoders, once.

Shards are dealt out to processes, each of which works on its own devices and waits for no other. A shard is written
under another name and renamed when it is whole, so that a run that was stopped is taken up at the next shard.
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
import ml_dtypes  # noqa: F401  (numpy learns "bfloat16")
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
from vllama_jax.io.paths import is_store_path
from vllama_jax.nn.network import abstract_network
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.feature_settings import compare_settings, describe_features
from vllama_jax.train.state import AbstractModel, Weights, keep_components
from vllama_jax.train.step import compute_dtype, run_encoders

FEATURE_SHARD_BYTES = 512 * 2**20  # of a shard, about
SHARD_RECORDS = 4096  # of a shard at most: so many are encoded again when a run was stopped
WRITER_OPTIONS = (
    "group_size:1,uncompressed"  # each entry by itself, as they are read in any order; noise does not shrink
)
SYNC_TIMEOUT_SECONDS = 7 * 24 * 3600  # seconds that the first process waits for the last
STALE_FOLDER = re.compile(r"\.partial-(\d+)")

FeatureProgress = Callable[[float, float], None]


@dataclasses.dataclass(frozen=True)
class EncoderBatch:
    """What is encoded together: entries of one kind of one shard. entries: record × variants + variant of each."""

    cache: FeatureCache
    stream: Stream
    shard: int
    entries: range

    @property
    def examples(self) -> list[tuple[int, int]]:
        """(record, variant) of each."""
        return [divmod(entry, self.cache.variants) for entry in self.entries]


@dataclasses.dataclass(frozen=True)
class MediaDecoder:
    """The pixels or sounds of batches, by their number. It can be sent to another process."""

    reader: BatchReader
    batches: list[EncoderBatch]

    def __call__(self, number: int) -> list[DecodedMedia]:
        batch = self.batches[number]
        return self.reader.decode_all(batch.stream, batch.examples)


@dataclasses.dataclass(frozen=True)
class PrecomputeResult:
    """What one process did.

    records, seconds: encoded now, and how long that took. shards, kept: that it has, and that were whole before.
    bytes: of its shards. skipped: (id, why) of the records in them that could not be decoded.
    """

    records: int
    seconds: float
    num_shards: int
    num_existing_shards: int
    bytes: int
    skipped: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One shard of a cache. streams: of its dataset, in the records' order."""

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
        """Its entries, in order: the same batches whatever was done before, so that its bytes are the same."""
        variants, here = self.cache.variants, self.cache.shard_range(self.number)
        for stream in self.streams:
            first = max(here.start, stream.numbers.start) * variants
            last = min(here.stop, stream.numbers.stop) * variants
            for start in range(first, last, sizes[stream.kind]):
                yield EncoderBatch(self.cache, stream, self.number, range(start, min(start + sizes[stream.kind], last)))


def precompute_features(
    config: TrainConfig,
    out: Path,
    base: str = "",
    shard_records: int = 0,
    progress: FeatureProgress = lambda done, all: None,
) -> PrecomputeResult:
    """Makes this process's shards of the caches of a run's datasets, those that `out` does not have yet.

    base: where the base model is now. shard_records: how many records a shard holds; 0 for some 512 MB of them.
    progress: hears how many records of all are done.

    Raises ConfigError where `out` holds features that were made with other settings; DataError when it cannot be
    written and when not a single record can be decoded; CheckpointError for the model.
    """
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
            manifest = _manifest(config, directory, dataset, records)
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
    """Decoding runs ahead of the encoders, and the encoders run while what they made before is written."""
    encoder = load_encoder(config, directory, {stream.kind for shard in all_shards for stream in shard.streams})
    sizes = _batch_sizes(config, all_shards)
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
                if file.whole:
                    file.finish()
                    file = None


class _ShardFile:
    """A shard on its way: under another name until it is whole."""

    def __init__(self, shard: _Shard, scratch: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._shard = shard
        self._path = scratch / shard.path.name
        self._writer = ArrayRecordWriter(str(self._path), WRITER_OPTIONS)
        self._left = shard.cache.entries(shard.number)
        self._skipped: list[dict[str, Any]] = []

    @property
    def whole(self) -> bool:
        return self._left == 0

    def add(self, batch: EncoderBatch, decoded: list[DecodedMedia], features: np.ndarray) -> None:
        """A batch's entries. Rows of `features` beyond the batch are padding; none where nothing could be decoded."""
        for row, (found, (record, variant)) in enumerate(zip(decoded, batch.examples, strict=True)):
            if found.problem:
                self._skipped.append({"record": record, "variant": variant, "id": found.name, "why": found.problem})
                self._write(pack_error(found.problem))
            else:
                self._write(pack_features(features[row], found.timestamps))
        self._left -= len(decoded)

    def finish(self) -> None:
        """On disk, and under its name. Raises DataError when it cannot be written."""
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
                f"{self._shard.path}: cannot be written ({format_error(error)}); whole shards are kept"
            ) from error


def load_encoder(
    config: TrainConfig, directory: ModelDirectory, kinds: Collection[Kind]
) -> Callable[[Kind, np.ndarray | None], Array | None]:
    """(kind, media [b, …]) → features [b, …] in the compute dtype, not waited for; None for None.

    The batch is split over this process's devices. Each has all weights: they are small beside a language model's, and
    nothing has to be gathered for each layer.
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


def _batch_sizes(config: TrainConfig, all_shards: list[_Shard]) -> dict[Kind, int]:
    """How many entries are encoded at a time: this process's part of a step's, or fewer where there are no more."""
    devices = jax.local_device_count()
    whole = config.batch_size // config.grad_accum_steps / jax.process_count()
    sizes: dict[Kind, int] = {}
    for shard in all_shards:
        for stream in shard.streams:
            most = min(len(stream.numbers), shard.cache.shard_records) * shard.cache.variants
            sizes[stream.kind] = max(sizes.get(stream.kind, 0), math.ceil(min(whole, most) / devices) * devices)
    return sizes


def _pad_batch(decoded: list[DecodedMedia], size: int) -> np.ndarray | None:
    """[size, …], zeros where there are no media; None where there are none at all."""
    found = next((one.media for one in decoded if one.media is not None), None)
    if found is None:
        return None
    rows = np.zeros((size, *found.shape), found.dtype)
    for row, one in zip(rows, decoded, strict=False):
        if one.media is not None:
            row[...] = one.media
    return rows


def _manifest(
    config: TrainConfig, directory: ModelDirectory, dataset: DatasetConfig, records: Records
) -> dict[str, Any]:
    """What the features depend on, and a number of records for a shard: of a size that is good to read and to write."""
    settings = describe_features(config, directory, dataset, records)
    itemsize = compute_dtype(config).itemsize
    entry = max(math.prod(shape) for shape in settings["shapes"].values()) * itemsize
    fit = min(FEATURE_SHARD_BYTES // (entry * settings["variants"]), SHARD_RECORDS, len(records))
    rows = config.batch_size // config.grad_accum_steps
    return {**settings, "shard_records": max(fit // rows * rows or fit, 1)}


def _open_or_create(folder: Path, scratch: Path, manifest: dict[str, Any], shard_records: int) -> FeatureCache:
    """The cache in a folder, made with these settings or begun now. Raises ConfigError where it was with others."""
    if not (folder / "manifest.json").exists():  # other processes may do the same: they write the same
        ensure_directory(folder)
        write_json(scratch / "manifest.json", manifest | ({"shard_records": shard_records} if shard_records else {}))
        move_file(scratch / "manifest.json", folder / "manifest.json")
    cache, made = open_cache_folder(folder)
    wanted = {**manifest, "shard_records": shard_records or cache.shard_records}
    if changed := compare_settings(made, wanted):
        raise ConfigError(
            f"{folder}: holds features made with other settings ({'; '.join(changed)}); "
            "give the same, or choose another --out"
        )
    return cache


def _check_out(out: Path) -> None:
    """Raise DataError where `out` is the directory of something else than features."""
    if unexpected := next((name for name in ("config.json", "manifest.json") if (out / name).exists()), None):
        raise DataError(f"{out}: holds something else (it has {unexpected}); choose another --out")


@contextlib.contextmanager
def _scratch_folder(out: Path) -> Iterator[Path]:
    """A folder in `out` for what is not whole yet, of this process alone; it is removed in the end."""
    process = jax.process_index()
    folder = out / f".partial-{process}"
    try:
        if not is_store_path(out):
            out.mkdir(parents=True, exist_ok=True)
            for stale in out.glob(".partial-*") if process == 0 else ():  # of a killed run of more processes
                if (found := STALE_FOLDER.fullmatch(stale.name)) and int(found[1]) >= jax.process_count():
                    shutil.rmtree(stale, ignore_errors=True)
        busy_message = f"{out}: another process is writing features there; wait for it, or choose another --out"
        with scratch_directory(folder, busy_message):
            yield folder
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error}); whole shards are kept") from error


def _processes() -> tuple[int, int]:
    """Which process this is, and of how many."""
    return jax.process_index(), jax.process_count()


def _wait_for_other_processes() -> None:
    """JAX ends all processes when one of them goes before the others. No device takes part in this."""
    everyone = set(range(jax.process_count()))
    multihost.sync_global_processes("vllama features", timeout=SYNC_TIMEOUT_SECONDS, processes=everyone)


def _read_skipped(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a skipped-*.jsonl. Raises DataError when it is corrupt."""
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
