"""Feature caches: outputs of the frozen encoders for every record, which training reads in place of media.

DIR/NAME-DIGEST/   one folder for each records directory: its name, and the first digits of its digest
  manifest.json    what the features depend on: records, encoders, transform, dtype; their shapes; variants; shards
  features-00003-of-00010.array_record     uncompressed: all variants of a record, then those of the next record
  skipped-00003-of-00010.jsonl             records of that shard that could not be decoded, if there are any

An entry is the bytes of the features, the timestamps of the frames (float64 seconds, of videos only), and a byte 1; or
an error message and a byte 0. `vllama features` writes caches (train/precompute.py). Reading does not import jax,
because worker processes do it.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, Literal

import ml_dtypes  # noqa: F401  (registers "bfloat16" with numpy)
import numpy as np
import xxhash

from vllama_jax.config import from_dict
from vllama_jax.data.annotation import Kind
from vllama_jax.data.records import Records, record_ranges
from vllama_jax.errors import ConfigError, DataError
from vllama_jax.io.json_files import read_object
from vllama_jax.io.paths import is_store_path
from vllama_jax.io.store_cache import copy_file, copy_folder

FEATURES_FORMAT = 1
USABLE, UNUSABLE = b"\1", b"\0"  # last byte of an entry
RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
LARGEST_NUMBER = 2**40  # limit of all numbers in a manifest
_REBUILD_HINT = "remove that file and run `vllama features` again"
OPEN_SHARDS = 256  # for each process, which may usually open 1024 files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest.json of a records directory's features, created by `train/feature_settings.py`.

    Attributes:
        format: FEATURES_FORMAT of the version that wrote it.
        branch: The branch whose encoder computed the features.
        records: The digest of the records directory.
        kinds: Number of records of each kind.
        shapes: Shape of the features of one variant, for each kind.
        dtype: Of the features.
        variants: Number of variants of each record.
        shard_records: Number of records in a shard; the last one may have fewer.
        transform: Settings of frame sampling and augmentation, and sizes of the encoders' inputs.
        encoders: Digest of each encoder component's weights and config.
    """

    format: int
    branch: str
    records: str
    kinds: dict[Kind, int]
    shapes: dict[Kind, tuple[int, ...]]
    dtype: Literal["float32", "bfloat16"]
    variants: int
    shard_records: int
    transform: dict[str, Any]
    encoders: dict[str, str]


@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """The features of one records directory.

    Files are opened when they are first read, so a cache can be sent to another process. Any number of threads may
    read.

    Attributes:
        path: The folder.
        digest: Of everything that the features depend on.
        kinds: Record numbers of each kind.
        shapes: Shape of the features of one variant, for each kind.
        dtype_name: "float32" or "bfloat16".
        variants: Number of variants of each record.
        shard_records: Number of records in a shard; the last one may have fewer.
    """

    path: Path
    digest: str
    kinds: dict[Kind, range]
    shapes: dict[Kind, tuple[int, ...]]
    dtype_name: str
    variants: int
    shard_records: int

    def __len__(self) -> int:
        """Return the number of records."""
        return sum(map(len, self.kinds.values()))

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the features."""
        return np.dtype(self.dtype_name)

    def shape(self, kind: Kind) -> tuple[int, ...]:
        """Return the shape of one variant: [t, q, d] of the vision branch, [t or s, e] of the audio branch."""
        return self.shapes[kind]

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return -(-len(self) // self.shard_records)

    def shard_path(self, shard: int, prefix: str = "features", suffix: str = "array_record") -> Path:
        """Return the path of a file of a shard."""
        return self.path / f"{prefix}-{shard:05}-of-{self.num_shards:05}.{suffix}"

    def shard_range(self, shard: int) -> range:
        """Return the record numbers of a shard."""
        return range(len(self))[shard * self.shard_records : (shard + 1) * self.shard_records]

    def is_complete(self, shard: int) -> bool:
        """Return whether a shard exists and has all its entries. On an object store, an object is always complete."""
        path = self.shard_path(shard)
        if is_store_path(path):
            return path.exists()
        return _reader(str(path)).num_records() == self.entries(shard)

    def read(self, record: int, variant: int) -> tuple[np.ndarray, tuple[float, ...]]:
        """Read the features of one variant of a record.

        Args:
            record: The record number.
            variant: The variant, from 0 to `variants` - 1.

        Returns:
            The features, with the shape of the record's kind, and the timestamps of a video's frames in seconds.

        Raises:
            DataError: The entry cannot be read, or the record could not be decoded; the message is the reason.
        """
        shard, position = divmod(record, self.shard_records)
        entry = self._entry(shard, position * self.variants + variant)
        if entry.endswith(UNUSABLE):
            raise DataError(entry[:-1].decode())
        kind = next(kind for kind, numbers in self.kinds.items() if record in numbers)
        shape = self.shapes[kind]
        num_timestamps = shape[0] if kind == "video" else 0
        count = math.prod(shape)
        if len(entry) != count * self.dtype.itemsize + num_timestamps * 8 + len(USABLE):
            raise DataError(
                f"{self.shard_path(shard)}: record {record} does not have the size given in manifest.json; "
                f"{_REBUILD_HINT}"
            )
        features = np.frombuffer(entry, self.dtype, count).reshape(shape)
        return features, tuple(np.frombuffer(entry, "<f8", num_timestamps, offset=features.nbytes).tolist())

    def _entry(self, shard: int, position: int) -> bytes:
        path = self.shard_path(shard)
        try:
            local = path
            if is_store_path(path):  # array_record reads local files only
                local = copy_file(path, copy_folder(path.parent, self.digest.encode()) / path.name)
            return _open_shard(str(local), self.entries(shard)).read([position])[0]
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"{path}: corrupt ({' '.join(str(error).split())[:120]}); {_REBUILD_HINT}") from error

    def entries(self, shard: int) -> int:
        """Return the number of entries of a shard: its records times `variants`."""
        return len(self.shard_range(shard)) * self.variants


@functools.lru_cache(OPEN_SHARDS)
def _open_shard(path: str, entries: int) -> Any:
    """Open a shard and keep it open. Raises DataError if it is missing or has another number of entries."""
    reader = _reader(path)
    if reader.num_records() != entries:
        raise DataError(f"{path}: missing or incomplete; {_REBUILD_HINT}")
    return reader


def _reader(path: str) -> Any:
    """Open an array_record file. A missing file is not an error here: its reader has no records."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(path, RANDOM_ACCESS)


def pack_features(features: np.ndarray, timestamps: tuple[float, ...]) -> bytes:
    """Pack the features of one variant into an entry.

    Args:
        features: The features.
        timestamps: Of a video's frames, in seconds; empty for other kinds.
    """
    return b"".join([features.tobytes(), np.asarray(timestamps, "<f8").tobytes(), USABLE])


def pack_error(why: str) -> bytes:
    """Pack the reason why a record could not be decoded into an entry."""
    return why.encode() + UNUSABLE


def find_cache_folder(root: Path, records: Records) -> Path:
    """Return the folder of a records directory's features in `root`, which may not exist yet.

    A folder is found by the digest of the records, so the records may have been moved or renamed.
    """
    end = f"-{records.digest[:8]}"
    existing = sorted(folder for folder in root.glob(f"*{end}") if folder.is_dir())
    return existing[0] if existing else root / f"{records.path.resolve().name}{end}"


def open_cache_folder(folder: Path) -> tuple[FeatureCache, dict[str, Any]]:
    """Open the feature cache in a folder.

    Returns:
        The cache, and the fields of its manifest.json.

    Raises:
        DataError: There is no cache, it has another format, or its manifest is invalid.
    """
    advice = f"remove {folder} and run `vllama features` again"
    fields = read_object(folder / "manifest.json", DataError, advice)
    if fields.get("format") != FEATURES_FORMAT:
        raise DataError(
            f"{folder}: features of format {fields.get('format')!r}, but this version reads {FEATURES_FORMAT}; "
            "remove them and run `vllama features` again"
        )
    try:
        manifest = from_dict(fields, Manifest, str(folder / "manifest.json"), range(1, LARGEST_NUMBER))
    except ConfigError as error:
        raise DataError(f"{error}; {advice}") from error
    identity = json.dumps({name: value for name, value in fields.items() if name != "shard_records"}, sort_keys=True)
    cache = FeatureCache(
        path=folder,
        digest=xxhash.xxh3_128_hexdigest(identity.encode()),
        kinds=record_ranges(manifest.kinds),
        shapes=manifest.shapes,
        dtype_name=manifest.dtype,
        variants=manifest.variants,
        shard_records=manifest.shard_records,
    )
    if different := manifest.kinds.keys() ^ manifest.shapes.keys():
        raise DataError(
            f"{folder / 'manifest.json'}: kinds and shapes disagree on {', '.join(sorted(different))}; {advice}"
        )
    return cache, fields


def check_complete(cache: FeatureCache) -> None:
    """Check that all shards exist.

    Raises:
        DataError: A shard is missing, or the first or the last one is incomplete.
    """
    names = {entry.name for entry in cache.path.iterdir()}
    found = sum(cache.shard_path(shard).name in names for shard in range(cache.num_shards))
    if found < cache.num_shards:
        raise DataError(
            f"{cache.path}: has {found} of {cache.num_shards} shards; run `vllama features` again with the same "
            "settings to write the others"
        )
    for shard in {0, cache.num_shards - 1}:  # not all: opening a file on a mount may take a second
        if not cache.is_complete(shard):
            raise DataError(
                f"{cache.shard_path(shard)}: its number of entries is not that of manifest.json; {_REBUILD_HINT}"
            )
