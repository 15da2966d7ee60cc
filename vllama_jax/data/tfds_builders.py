"""The two TFDS datasets of a records directory: written in the order they come, and read, without TensorFlow.

A GeneratorBasedBuilder would hold records in memory, and beyond 1 GB it needs TensorFlow to put them in order
(tensorflow_datasets/core/shuffle.py). A ShardBasedBuilder writes them as they come; it wants to know how many go into
each file.

Reading goes past TFDS's `builder_from_directory`, which imports whatever module `features.json` names. A directory's
JSON files are compared with what is written here, and records are decoded by the features of this module.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.writer import ExampleWriter

from vllama_jax.data.annotation import Annotation
from vllama_jax.errors import DataError, format_error
from vllama_jax.io.json_files import read_object

SPLIT = "train"  # TFDS's name for all of a dataset
RECORD_SHARD_BYTES = 256 * 2**20  # of each file but the last, at least
_ANEW = "build the records again"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # TFDS's own, for the names of a dataset's files
MAX_SHARDS = 256  # a reader keeps all files open, and a process may open 1024 unless told otherwise


def plan_shards(sizes: Sequence[int]) -> list[int]:
    """How many records go into each file; `sizes` are the records' in bytes."""
    wanted = max(RECORD_SHARD_BYTES, sum(sizes) // MAX_SHARDS)
    counts, count, size = [], 0, 0
    for one in sizes:
        count, size = count + 1, size + one
        if size >= wanted:
            counts.append(count)
            count = size = 0
    return [*counts, count] if count else counts


def make_text_example(annotation: Annotation) -> dict[str, Any]:
    questions, answers = zip(*annotation.turns, strict=True)
    return {
        "id": annotation.id,
        "kind": annotation.kind,
        "questions": list(questions),
        "answers": list(answers),
        "media_at": annotation.media_at,
    }


class _Builder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # of TFDS, which has no types
    """A TFDS dataset of given examples, in their order; `counts` of them in each file."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: tfds.features.FeaturesDict

    def __init__(self, examples: Iterable[dict[str, Any]], counts: Sequence[int], **options: Any):
        self._examples, self._counts = iter(examples), counts
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=self.FEATURES, disable_shuffling=True)

    def _shard_iterators_per_split(self, _: Any) -> dict[str, list[Callable[[], Iterator[tuple[int, dict]]]]]:
        return {SPLIT: [functools.partial(self._shard, count) for count in self._counts]}

    def _shard(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, example in enumerate(itertools.islice(self._examples, count)):
            yield number, example
            example.clear()  # TFDS holds on to a file's examples until it has counted them


class Texts(_Builder, skip_registration=True):  # type: ignore[call-arg]  # of TFDS, which has no types
    """What is said of each file."""

    FEATURES = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "kind": tfds.features.Text(),
            "questions": tfds.features.Sequence(tfds.features.Text()),
            "answers": tfds.features.Sequence(tfds.features.Text()),
            "media_at": tfds.features.Scalar(np.int64),
        }
    )


class Media(_Builder, skip_registration=True):  # type: ignore[call-arg]  # of TFDS, which has no types
    """The files, as they were on disk."""

    FEATURES = tfds.features.FeaturesDict({"id": tfds.features.Text(), "media": tfds.features.Text()})

    def _example_writer(self) -> ExampleWriter:
        return _Uncompressed(self.info.file_format)


class _Uncompressed(ExampleWriter):
    """Media are compressed already: zstd, which TFDS would use, halves the speed for nothing."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")  # 1: a record is read without its neighbours
        for _, example in examples:
            writer.write(example)
        writer.close()


def write_dataset(builder: tfds.core.DatasetBuilder, folder: Path) -> None:
    """Builds a dataset, and moves its files from where TFDS puts them (NAME/VERSION) to one folder.

    Raises OSError where the disk does not take it.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it talks of downloads
        try:
            builder.download_and_prepare()
        except RuntimeError as error:  # array_record's for a full disk
            raise OSError(format_error(error)) from error
    Path(builder.data_path).rename(folder)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One array_record file, as array_record's data source asks for it: all of its records."""

    filename: str
    examples_in_shard: int
    skip: int = 0

    @property
    def take(self) -> int:
        return self.examples_in_shard


@dataclasses.dataclass(frozen=True)
class StoredDataset:
    """Random access to a dataset on disk, which threads share. Each file is opened when it is first read.

    Attributes:
        shards: The files, in order.
        features: What decodes a record.
        source: array_record's data source.
    """

    shards: Sequence[Shard]
    features: tfds.features.FeaturesDict
    source: Any

    def __len__(self) -> int:
        return sum(shard.examples_in_shard for shard in self.shards)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.features.deserialize_example_np(self.source[number])


def read_dataset(folder: Path) -> StoredDataset:
    """Open the dataset in `folder`, whose name says which one it is: texts or media. Imports nothing that it names.

    Raises:
        DataError: features.json or dataset_info.json is missing, or does not say what `write_dataset` writes.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    features = {"texts": Texts, "media": Media}[folder.name].FEATURES
    _check_features(folder / "features.json", features)
    name = f"{folder.name}-{SPLIT}.array_record"
    counts = _shard_lengths(folder / "dataset_info.json")
    shards = [
        Shard(str(folder / f"{name}-{number:05}-of-{len(counts):05}"), count) for number, count in enumerate(counts)
    ]
    return StoredDataset(shards, features, ArrayRecordDataSource(shards))


def _check_features(path: Path, features: tfds.features.FeaturesDict) -> None:
    from google.protobuf import json_format

    written = json_format.MessageToDict(features.to_proto())  # as TFDS's FeatureConnector.save_config
    stored, ours = (dict(_class_names(found)) for found in (read_object(path, DataError, _ANEW), written))
    if strange := sorted({str(name) for name in stored.values()} - set(ours.values())):
        raise DataError(f"{path}: names {strange[0][:100]!r}, which is no feature of these records; {_ANEW}")
    if stored != ours:
        raise DataError(f"{path}: its features are not those of these records; {_ANEW}")


def _class_names(feature: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The Python class that TFDS would look up for each feature, by its place in features.json."""
    for key, value in feature.items() if isinstance(feature, dict) else ():
        if key in ("pythonClassName", "type"):  # "type": of TFDS before 4.5
            yield place, value
        else:
            yield from _class_names(value, f"{place}/{key}")


def _shard_lengths(path: Path) -> list[int]:
    """How many records each file holds, of a dataset_info.json that says what ours say."""
    info = read_object(path, DataError, _ANEW)
    splits = info.get("splits")
    split = splits[0] if isinstance(splits, list) and len(splits) == 1 and isinstance(splits[0], dict) else {}
    lengths = split.get("shardLengths")
    expected = {
        "name": (info.get("name"), path.parent.name),
        "fileFormat": (info.get("fileFormat"), "array_record"),
        "moduleName": (str(info.get("moduleName")).partition(".")[0], __name__.partition(".")[0]),
        "splits": (split.get("name"), SPLIT),
        "filepathTemplate": (split.get("filepathTemplate", _TEMPLATE), _TEMPLATE),
    }
    if wrong := [field for field, (found, wanted) in expected.items() if found != wanted]:
        raise DataError(f"{path}: its {wrong[0]} is not that of these records; {_ANEW}")
    if not isinstance(lengths, list) or not lengths or not all(re.fullmatch("[0-9]{1,18}", str(n)) for n in lengths):
        raise DataError(f"{path}: its shardLengths are not numbers of records; {_ANEW}")
    return [int(length) for length in lengths]
