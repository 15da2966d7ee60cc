"""The feature cache: what the frozen encoders see and hear of every record, to train from in place of the media.

DIR/NAME-DIGEST/   one folder for each records directory: its name, and the first letters of its digest
  manifest.json    what the features depend on: records, encoders, transform, dtype; their shapes; variants; shards
  features-00003-of-00010.array_record     uncompressed: every record's variants one after the other, records in order
  skipped-00003-of-00010.jsonl             records of that shard that could not be decoded, where there are any

An entry is the features' bytes, the frames' seconds (float64, of videos), and a byte 1; or why there are none, and a
byte 0. `vllama features` writes caches (train/precompute.py). Reading imports no jax: it happens in worker processes.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, Literal

import ml_dtypes  # noqa: F401  (numpy learns "bfloat16")
import numpy as np
import xxhash

from vllama_jax.config import from_dict
from vllama_jax.data.annotation import Kind
from vllama_jax.data.records import Records, record_ranges
from vllama_jax.errors import ConfigError, DataError
from vllama_jax.io.json_files import read_object

FEATURES_FORMAT = 1
USABLE, UNUSABLE = b"\1", b"\0"  # how an entry ends
RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
LARGEST_NUMBER = 2**40  # of records, variants or values in a manifest
_ANEW = "remove that file and run `vllama features` again"
OPEN_SHARDS = 256  # of a process: well under the usual limit of 1024 open files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json of the features of one records directory, as `train/feature_settings.py` makes it.

    kinds: How many records there are of each kind. The meaning of other fields: `FeatureCache` and there.
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
    """The features of one records directory. Files are opened at the first reading, so that it can be sent to another
    process; any number of threads may read.

    digest: of what the features depend on. kinds: the record numbers of each kind. shapes: of one variant of a record
    of each kind. shard_records: how many records a shard holds; the last one may hold fewer.
    """

    path: Path
    digest: str
    kinds: dict[Kind, range]
    shapes: dict[Kind, tuple[int, ...]]
    dtype_name: str
    variants: int
    shard_records: int

    def __len__(self) -> int:
        """How many records."""
        return sum(map(len, self.kinds.values()))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.dtype_name)

    def shape(self, kind: Kind) -> tuple[int, ...]:
        """[t, q, d] or [t or s, e]."""
        return self.shapes[kind]

    @property
    def num_shards(self) -> int:
        return -(-len(self) // self.shard_records)

    def shard_path(self, shard: int, what: str = "features", suffix: str = "array_record") -> Path:
        return self.path / f"{what}-{shard:05}-of-{self.num_shards:05}.{suffix}"

    def shard_range(self, shard: int) -> range:
        """The records that it holds."""
        return range(len(self))[shard * self.shard_records : (shard + 1) * self.shard_records]

    def is_complete(self, shard: int) -> bool:
        """Whether a shard is there with all its entries."""
        return _reader(str(self.shard_path(shard))).num_records() == self.entries(shard)

    def read(self, record: int, variant: int) -> tuple[np.ndarray, tuple[float, ...]]:
        """Features of a record, and the seconds of a video's frames.

        Raises DataError for what cannot be read, and for a record that could not be decoded, saying why.
        """
        shard, place = divmod(record, self.shard_records)
        entry = self._entry(shard, place * self.variants + variant)
        if entry.endswith(UNUSABLE):
            raise DataError(entry[:-1].decode())
        kind = next(kind for kind, numbers in self.kinds.items() if record in numbers)
        shape = self.shapes[kind]
        times = shape[0] if kind == "video" else 0
        count = math.prod(shape)
        if len(entry) != count * self.dtype.itemsize + times * 8 + len(USABLE):
            raise DataError(f"{self.shard_path(shard)}: record {record} is not as manifest.json says; {_ANEW}")
        features = np.frombuffer(entry, self.dtype, count).reshape(shape)
        return features, tuple(np.frombuffer(entry, "<f8", times, offset=features.nbytes).tolist())

    def _entry(self, shard: int, place: int) -> bytes:
        path = self.shard_path(shard)
        try:
            return _open_shard(str(path), self.entries(shard)).read([place])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"{path}: damaged ({' '.join(str(error).split())[:120]}); {_ANEW}") from error

    def entries(self, shard: int) -> int:
        return len(self.shard_range(shard)) * self.variants


@functools.lru_cache(OPEN_SHARDS)
def _open_shard(path: str, entries: int) -> Any:
    """A reader of a shard, kept. Raises DataError where the file is missing or has another number of entries."""
    reader = _reader(path)
    if reader.num_records() != entries:
        raise DataError(f"{path}: missing, or not whole; {_ANEW}")
    return reader


def _reader(path: str) -> Any:
    """What is no such file has no records: opening it raises nothing."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(path, RANDOM_ACCESS)


def pack_features(features: np.ndarray, timestamps: tuple[float, ...]) -> bytes:
    """An entry."""
    return b"".join([features.tobytes(), np.asarray(timestamps, "<f8").tobytes(), USABLE])


def pack_error(why: str) -> bytes:
    """The entry of what could not be decoded."""
    return why.encode() + UNUSABLE


def find_cache_folder(root: Path, records: Records) -> Path:
    """Where the features of these records are, or would be, wherever the records are now."""
    end = f"-{records.digest[:8]}"
    there = sorted(folder for folder in root.glob(f"*{end}") if folder.is_dir())
    return there[0] if there else root / f"{records.path.resolve().name}{end}"


def open_cache_folder(folder: Path) -> tuple[FeatureCache, dict[str, Any]]:
    """The cache in a folder, and its manifest. Raises DataError where there is none that this version reads."""
    advice = f"remove {folder} and make it anew with `vllama features`"
    made = read_object(folder / "manifest.json", DataError, advice)
    if made.get("format") != FEATURES_FORMAT:
        raise DataError(
            f"{folder}: features of format {made.get('format')!r}, this version reads {FEATURES_FORMAT}; "
            "make them anew with `vllama features`"
        )
    try:
        manifest = from_dict(made, Manifest, str(folder / "manifest.json"), range(1, LARGEST_NUMBER))
    except ConfigError as error:
        raise DataError(f"{error}; {advice}") from error
    same = json.dumps({name: value for name, value in made.items() if name != "shard_records"}, sort_keys=True)
    cache = FeatureCache(
        path=folder,
        digest=xxhash.xxh3_128_hexdigest(same.encode()),
        kinds=record_ranges(manifest.kinds),
        shapes=manifest.shapes,
        dtype_name=manifest.dtype,
        variants=manifest.variants,
        shard_records=manifest.shard_records,
    )
    if strange := manifest.kinds.keys() ^ manifest.shapes.keys():
        raise DataError(
            f"{folder / 'manifest.json'}: kinds and shapes disagree on {', '.join(sorted(strange))}; {advice}"
        )
    return cache, made


def check_complete(cache: FeatureCache) -> None:
    """Raise DataError unless all shards are there."""
    there = {entry.name for entry in cache.path.iterdir()}
    found = sum(cache.shard_path(shard).name in there for shard in range(cache.num_shards))
    if found < cache.num_shards:
        raise DataError(
            f"{cache.path}: {found} of {cache.num_shards} shards are there; run `vllama features` again, as before, "
            "and it makes the others"
        )
    for shard in {0, cache.num_shards - 1}:  # all of them are not opened here: a mount may take a second for each
        if not cache.is_complete(shard):
            raise DataError(f"{cache.shard_path(shard)}: not as many entries as manifest.json says; {_ANEW}")
