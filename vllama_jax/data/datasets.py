"""The two TFDS datasets of a records directory, written in the order they come, without TensorFlow.

A GeneratorBasedBuilder would hold records in memory, and beyond 1 GB it needs TensorFlow to put them in order
(tensorflow_datasets/core/shuffle.py). A ShardBasedBuilder writes them as they come; it wants to know how many go into
each file.
"""

import contextlib
import functools
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.writer import ExampleWriter

from vllama_jax.data.records import SPLIT, Annotation

SHARD_BYTES = 256 * 2**20  # of each file but the last, at least
MAX_SHARDS = 256  # a reader keeps all files open, and a process may open 1024 unless told otherwise


def shard_counts(sizes: Sequence[int]) -> list[int]:
    """How many records go into each file; `sizes` are the records' in bytes."""
    wanted = max(SHARD_BYTES, sum(sizes) // MAX_SHARDS)
    counts, count, size = [], 0, 0
    for one in sizes:
        count, size = count + 1, size + one
        if size >= wanted:
            counts.append(count)
            count = size = 0
    return [*counts, count] if count else counts


def text_example(annotation: Annotation) -> dict[str, Any]:
    questions, answers = zip(*annotation.turns, strict=True)
    return {
        "id": annotation.id,
        "kind": annotation.kind,
        "questions": list(questions),
        "answers": list(answers),
        "media_at": annotation.media_at,
    }


class _Builder(tfds.core.ShardBasedBuilder, skip_registration=True):
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


class Texts(_Builder, skip_registration=True):
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


class Media(_Builder, skip_registration=True):
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
            raise OSError(" ".join(str(error).split())) from error
    Path(builder.data_path).rename(folder)
