"""Write and read the two TFDS datasets of a records directory, in order and without TensorFlow.

A GeneratorBasedBuilder would keep records in memory, and needs TensorFlow to sort more than 1 GB
(tensorflow_datasets/core/shuffle.py). A ShardBasedBuilder writes records as they come, but requires the number of
records in each file in advance.

Reading does not use TFDS's `builder_from_directory`, which imports any module that `features.json` names. The JSON
files of a directory are compared with those that this module writes, and records are decoded by its own features.
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

SPLIT = "train"  # the TFDS split that holds the whole dataset
RECORD_SHARD_BYTES = 256 * 2**20  # minimum size of each file but the last
_REBUILD_HINT = "build the records again"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # TFDS's default for file names
MAX_SHARDS = 256  # a reader keeps all files open, and a process may usually open 1024 files


def plan_shards(sizes: Sequence[int]) -> list[int]:
    """Choose the number of records in each file.

    Args:
        sizes: Size of each record in bytes.
    """
    min_bytes = max(RECORD_SHARD_BYTES, sum(sizes) // MAX_SHARDS)
    counts, count, shard_bytes = [], 0, 0
    for size in sizes:
        count, shard_bytes = count + 1, shard_bytes + size
        if shard_bytes >= min_bytes:
            counts.append(count)
            count = shard_bytes = 0
    return [*counts, count] if count else counts


def make_text_example(annotation: Annotation) -> dict[str, Any]:
    """Make the TFDS example of an annotation."""
    questions, answers = zip(*annotation.turns, strict=True)
    return {
        "id": annotation.id,
        "kind": annotation.kind,
        "questions": list(questions),
        "answers": list(answers),
        "media_at": annotation.media_at,
    }


class _Builder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # of TFDS, which has no types
    """Writes given examples as a TFDS dataset, in order, `counts` of them into each file."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: tfds.features.FeaturesDict

    def __init__(self, examples: Iterable[dict[str, Any]], counts: Sequence[int], **options: Any):
        self._examples, self._counts = iter(examples), counts
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=self.FEATURES, disable_shuffling=True)

    def _shard_iterators_per_split(self, _: Any) -> dict[str, list[Callable[[], Iterator[tuple[int, dict]]]]]:
        return {SPLIT: [functools.partial(self._next_shard, count) for count in self._counts]}

    def _next_shard(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, example in enumerate(itertools.islice(self._examples, count)):
            yield number, example
            example.clear()  # TFDS keeps all examples of a file until it has counted them


class Texts(_Builder, skip_registration=True):  # type: ignore[call-arg]  # of TFDS, which has no types
    """The dataset of annotations. TFDS derives file names from the class name."""

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
    """The dataset of media files. TFDS derives file names from the class name."""

    FEATURES = tfds.features.FeaturesDict({"id": tfds.features.Text(), "media": tfds.features.Text()})

    def _example_writer(self) -> ExampleWriter:
        return _UncompressedWriter(self.info.file_format)


class _UncompressedWriter(ExampleWriter):
    """Writes without compression. Media are compressed, so TFDS's zstd would only halve the speed."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")  # 1: reads one record at a time
        for _, example in examples:
            writer.write(example)
        writer.close()


def write_dataset(builder: tfds.core.DatasetBuilder, folder: Path) -> None:
    """Write a dataset, and move its files from TFDS's folder NAME/VERSION to `folder`.

    Raises:
        OSError: Writing fails, for example because the disk is full.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints messages about downloads
        try:
            builder.download_and_prepare()
        except RuntimeError as error:  # raised by array_record if the disk is full
            raise OSError(format_error(error)) from error
    Path(builder.data_path).rename(folder)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One array_record file with all of its records, in the form that array_record's data source expects.

    Attributes:
        filename: The path.
        examples_in_shard: The number of records.
        skip: The number of records to skip.
    """

    filename: str
    examples_in_shard: int
    skip: int = 0

    @property
    def take(self) -> int:
        """The number of records to read."""
        return self.examples_in_shard


@dataclasses.dataclass(frozen=True)
class StoredDataset:
    """A dataset on disk with random access, which threads may share. Each file is opened when it is first read.

    Attributes:
        shards: The files, in order.
        features: Decodes a record.
        source: array_record's data source.
    """

    shards: Sequence[Shard]
    features: tfds.features.FeaturesDict
    source: Any

    def __len__(self) -> int:
        return sum(shard.examples_in_shard for shard in self.shards)

    def shard(self, number: int) -> Shard:
        """Return the file that contains a record."""
        for shard in self.shards:
            if number < shard.examples_in_shard:
                return shard
            number -= shard.examples_in_shard
        raise IndexError(f"there are only {len(self)} records")

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.features.deserialize_example_np(self.source[number])


def read_dataset(folder: Path) -> StoredDataset:
    """Open a dataset without importing anything that its files name.

    Args:
        folder: A folder whose name selects the dataset: "texts" or "media".

    Raises:
        DataError: features.json or dataset_info.json is missing, or differs from what `write_dataset` writes.
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
    stored, expected = dict(_class_names(read_object(path, DataError, _REBUILD_HINT))), dict(_class_names(written))
    if unknown := sorted({str(name) for name in stored.values()} - set(expected.values())):
        raise DataError(f"{path}: unexpected feature class {unknown[0][:100]!r}; {_REBUILD_HINT}")
    if stored != expected:
        raise DataError(f"{path}: does not have the features of a records directory; {_REBUILD_HINT}")


def _class_names(feature: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path in features.json, name of the Python class that TFDS would import) for each feature."""
    for key, value in feature.items() if isinstance(feature, dict) else ():
        if key in ("pythonClassName", "type"):  # "type": of TFDS before 4.5
            yield path, value
        else:
            yield from _class_names(value, f"{path}/{key}")


def _shard_lengths(path: Path) -> list[int]:
    """Read the number of records in each file from dataset_info.json, after checking its other fields."""
    info = read_object(path, DataError, _REBUILD_HINT)
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
    if wrong := [field for field, (found, value) in expected.items() if found != value]:
        raise DataError(f"{path}: unexpected value of {wrong[0]}; {_REBUILD_HINT}")
    if not isinstance(lengths, list) or not lengths or not all(re.fullmatch("[0-9]{1,18}", str(n)) for n in lengths):
        raise DataError(f"{path}: its shardLengths are not numbers; {_REBUILD_HINT}")
    return [int(length) for length in lengths]
