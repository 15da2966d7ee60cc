"""Annotations and files → a records directory, by TFDS, without TensorFlow. Media go through one file at a time."""

import contextlib
import dataclasses
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import xxhash

from vllama_jax.checkpoint import new_directory
from vllama_jax.data.records import FORMAT, KINDS, SPLIT, Annotation
from vllama_jax.data.sources import SOURCES
from vllama_jax.errors import DataError
from vllama_jax.files import first_bytes
from vllama_jax.params import write_json

Examples = Iterable[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Built:
    """What became of a source. skipped: annotations that were left out, each with why."""

    kinds: dict[str, int]
    skipped: list[tuple[str, str]]
    bytes: int


def build(name: str, source: Path, out: Path, progress: Callable[[int, int], None] = lambda done, all: None) -> Built:
    """Writes a records directory; `out` appears when it is whole. `progress` hears how many files of all are done.

    Raises DataError for a source that is not laid out as `name` says, or of which nothing can be used; CheckpointError
    when `out` exists or cannot be written.
    """
    if name not in SOURCES:
        raise DataError(f"no source {name!r}; choose one of {', '.join(SOURCES)}")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    entries, skipped = _usable(name, source)
    if not entries:
        why = f"; the first: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DataError(f"{source}: none of its {len(skipped)} annotations can be used{why}")
    digest, written = xxhash.xxh3_128(), 0

    def media() -> Iterator[dict[str, Any]]:
        nonlocal written
        for number, (annotation, path) in enumerate(entries):
            data = path.read_bytes()
            digest.update(json.dumps(dataclasses.astuple(annotation)).encode())
            digest.update(data)
            written += len(data)
            yield {"id": annotation.id, "media": data}
            progress(number + 1, len(entries))

    tfds.disable_progress_bar()
    with new_directory(out) as directory:
        texts = (_text_example(annotation) for annotation, _ in entries)
        _write(Texts(texts, data_dir=directory / "tfds", file_format="array_record"), directory / "texts")
        _write(Media(media(), data_dir=directory / "tfds", file_format="array_record"), directory / "media")
        shutil.rmtree(directory / "tfds")
        kinds = Counter(annotation.kind for annotation, _ in entries)
        lines = [json.dumps({"id": one, "why": why}) + "\n" for one, why in skipped]
        (directory / "skipped.jsonl").write_text("".join(lines))
        fields = {"format": FORMAT, "name": name, "kinds": dict(kinds), "digest": digest.hexdigest()}
        write_json(directory / "manifest.json", fields)
    return Built(dict(kinds), skipped, written)


def _usable(name: str, source: Path) -> tuple[list[tuple[Annotation, Path]], list[tuple[str, str]]]:
    """Entries whose file is there, in the order of kinds, and what is left out."""
    entries, skipped = [], []
    for entry in SOURCES[name](source):
        if isinstance(entry[0], str):
            skipped.append(entry)
            continue
        annotation, path = entry
        try:
            first_bytes(path, DataError)
        except DataError as error:
            skipped.append((annotation.id, str(error)))
        else:
            entries.append((annotation, path))
    return sorted(entries, key=lambda entry: KINDS.index(entry[0].kind)), skipped


def _text_example(annotation: Annotation) -> dict[str, Any]:
    questions, answers = zip(*annotation.turns, strict=True)
    return {
        "id": annotation.id,
        "kind": annotation.kind,
        "questions": list(questions),
        "answers": list(answers),
        "media_at": annotation.media_at,
    }


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS dataset of given examples, in their order."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: tfds.features.FeaturesDict

    def __init__(self, examples: Examples, **options: Any):
        self._examples = examples
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=self.FEATURES, disable_shuffling=True)

    def _split_generators(self, _: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {SPLIT: enumerate(self._examples)}

    def _generate_examples(self) -> None:
        """Never called: the split is given as a generator."""


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


def _write(builder: tfds.core.DatasetBuilder, folder: Path) -> None:
    """Builds, and moves what TFDS wrote under name and version to one folder."""
    with contextlib.redirect_stdout(io.StringIO()):  # it talks of downloads
        builder.download_and_prepare()
    Path(builder.data_path).rename(folder)
