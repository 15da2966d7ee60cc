"""Build a records directory from annotations and media files. Only a few files are in memory at a time."""

import array
import dataclasses
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
import xxhash

from vllama_jax.data.annotation import KINDS, Annotation, Kind
from vllama_jax.data.entries import Entry, Skipped
from vllama_jax.data.records import RECORDS_FORMAT
from vllama_jax.data.sources import SOURCES
from vllama_jax.data.tfds_builders import Media, Texts, make_text_example, plan_shards, write_dataset
from vllama_jax.errors import DataError, MediaError
from vllama_jax.io.atomic import check_absent, new_directory, staging_directory, write_json
from vllama_jax.io.paths import require_local
from vllama_jax.io.prefetch import map_in_order
from vllama_jax.media import check_media

READ_AHEAD = 4  # files in memory
CHECK_AHEAD = 16  # files whose first bytes are being read

BuildProgress = Callable[[str, int, int], None]


@dataclasses.dataclass
class BuildResult:
    """A summary of a build.

    Attributes:
        kinds: Number of records of each kind.
        sizes: Bytes of media of each kind.
        skipped: Number of skipped annotations, which skipped.jsonl lists.
        first_skipped: The first of them, with its reason and its position in the annotation file; "" if there is none.
    """

    kinds: dict[Kind, int]
    sizes: dict[Kind, int]
    skipped: int = 0
    first_skipped: str = ""


def build(
    name: str,
    source: Path,
    out: Path,
    progress: BuildProgress = lambda phase, done, total: None,
    *,
    allow_outside: bool = False,
) -> BuildResult:
    """Build a records directory. `out` appears by an atomic rename when it is complete.

    An annotation is skipped, and listed in skipped.jsonl, if it is malformed, or if its media file is missing or is
    not media.

    Args:
        name: The source's layout: a key of SOURCES.
        source: The folder that contains the unpacked source; for jsonl also the annotation file.
        out: The records directory to create.
        progress: Called with (phase, done, total) in the phases "annotations", whose total is 0 (not known), and
            "files".
        allow_outside: Also accept media files outside the source's folder: absolute paths, "..", or symlinks that lead
            outside.

    Returns:
        Counts of the records and of skipped annotations.

    Raises:
        DataError: `source` does not have the layout `name`, or none of its annotations can be used.
        CheckpointError: `out` exists or cannot be written.
    """
    if name not in SOURCES:
        raise DataError(f"no source {name!r}; choose one of {', '.join(SOURCES)}")
    check_absent(out)
    source = require_local(source, DataError)
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; pass the source's folder")
    tfds.disable_progress_bar()
    root = None if allow_outside else (source if source.is_dir() else source.parent).resolve()
    with new_directory(out) as created, staging_directory(created) as directory:
        plan = _Plan(directory / "plan")
        result = plan.fill(_check_entries(SOURCES[name](source), root), directory / "skipped.jsonl", progress)
        if not plan.media_sizes:
            first = f"; the first: {result.first_skipped}" if result.skipped else ""
            raise DataError(f"{source}: none of its {result.skipped} annotations can be used{first}")
        digest = _write_datasets(plan, directory, progress)
        shutil.rmtree(plan.folder)
        _write_manifest(directory, name, result, digest)
    return result


class _Plan:
    """The records to write, sorted by kind: annotations in one file per kind (there may be millions), and all sizes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.media_sizes, self.text_sizes = array.array("q"), array.array("q")
        folder.mkdir()

    def fill(self, entries: Iterable[Entry | Skipped], skipped: Path, progress: BuildProgress) -> BuildResult:
        """Sort entries by kind, and write skipped ones to the file `skipped`."""
        media = {kind: array.array("q") for kind in KINDS}
        texts = {kind: array.array("q") for kind in KINDS}
        files = {kind: (self.folder / kind).open("w", encoding="utf-8") for kind in KINDS}
        result = BuildResult({}, {})
        with skipped.open("w", encoding="utf-8") as skipped_file:
            for number, entry in enumerate(entries, 1):
                if isinstance(entry, Skipped):
                    result.first_skipped = result.first_skipped or str(entry)
                    result.skipped += 1
                    skipped_file.write(json.dumps(dataclasses.asdict(entry)) + "\n")
                else:
                    kind = entry.annotation.kind
                    line = json.dumps([*dataclasses.astuple(entry.annotation), str(entry.path)]) + "\n"
                    files[kind].write(line)
                    media[kind].append(entry.path.stat().st_size)
                    texts[kind].append(len(line))
                progress("annotations", number, 0)
        for kind in KINDS:
            files[kind].close()
            self.media_sizes += media[kind]
            self.text_sizes += texts[kind]
            if media[kind]:
                result.kinds[kind], result.sizes[kind] = len(media[kind]), sum(media[kind])
        return result

    def __iter__(self) -> Iterator[tuple[Annotation, Path]]:
        """Yield (annotation, path) in the order of records."""
        for kind in KINDS:
            with (self.folder / kind).open(encoding="utf-8") as file:
                for line in file:
                    name, _, turns, media_at, path = json.loads(line)
                    yield Annotation(name, kind, tuple(map(tuple, turns)), media_at), Path(path)


def _check_entries(entries: Iterator[Entry | Skipped], root: Path | None) -> Iterator[Entry | Skipped]:
    """Replace entries without a usable media file by `Skipped`, in order.

    Uses threads, because checks are slow on network file systems. Files must be inside `root` after symlinks are
    resolved, unless it is None.
    """

    def check(entry: Entry | Skipped) -> Entry | Skipped:
        if isinstance(entry, Skipped):
            return entry
        try:
            path = _resolve(entry.path, root)
            check_media(path)
        except (DataError, MediaError) as error:
            return Skipped(entry.place, entry.annotation.id, str(error))
        return dataclasses.replace(entry, path=path)

    return map_in_order(check, entries, CHECK_AHEAD)


def _resolve(path: Path, root: Path | None) -> Path:
    """Resolve symlinks, so that later changes of them do not change which file is packed."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a symlink to itself, before Python 3.13
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:100]})") from error
    if root is not None and not resolved.is_relative_to(root):
        raise DataError(
            f"{path}: leads outside the source's folder {root}; move it there, or allow it with --allow-outside"
        )
    return resolved


def _write_datasets(plan: _Plan, directory: Path, progress: BuildProgress) -> str:
    """Write texts/ and media/, and return their digest: of each annotation, then each file, with its length."""
    digest = xxhash.xxh3_128()

    def update_digest(data: bytes) -> bytes:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        return data

    def text_examples() -> Iterator[dict[str, Any]]:
        for annotation, _ in plan:
            update_digest(json.dumps(dataclasses.astuple(annotation)).encode())
            yield make_text_example(annotation)

    def media_examples() -> Iterator[dict[str, Any]]:
        files = map_in_order(lambda item: (item[0], _read_file(item[1])), plan, READ_AHEAD)
        for number, (annotation, data) in enumerate(files, 1):
            yield {"id": annotation.id, "media": update_digest(data)}
            progress("files", number, len(plan.media_sizes))

    tfds_folder = directory / "tfds"
    texts = Texts(text_examples(), plan_shards(plan.text_sizes), data_dir=tfds_folder)
    write_dataset(texts, directory / "texts")
    media = Media(media_examples(), plan_shards(plan.media_sizes), data_dir=tfds_folder)
    write_dataset(media, directory / "media")
    shutil.rmtree(tfds_folder)
    return digest.hexdigest()


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can no longer be read ({error.strerror}); build the records again") from error


def _write_manifest(directory: Path, name: str, result: BuildResult, digest: str) -> None:
    """Write manifest.json, after all other files are on disk."""
    files = sorted(path for folder in ("texts", "media") for path in (directory / folder).iterdir())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    packages = ("vllama-jax", "tensorflow-datasets", "array_record")
    fields = {
        "format": RECORDS_FORMAT,
        "name": name,
        "kinds": result.kinds,
        "sizes": result.sizes,
        "digest": digest,
        "skipped": result.skipped,
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "files": {str(path.relative_to(directory)): path.stat().st_size for path in files},
    }
    write_json(directory / "manifest.json", fields)
