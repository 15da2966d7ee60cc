"""Annotations and files → a records directory. Nothing is held in memory but a few files at a time."""

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
from vllama_jax.io.atomic import check_absent, new_directory, write_json
from vllama_jax.io.prefetch import map_in_order
from vllama_jax.media import check_media

READ_AHEAD = 4  # files held in memory
CHECK_AHEAD = 16  # files whose first bytes are read

BuildProgress = Callable[[str, int, int], None]


@dataclasses.dataclass
class BuildResult:
    """What became of a source.

    Attributes:
        kinds: How many records there are of each kind.
        sizes: How many bytes of media.
        skipped: How many annotations were left out; skipped.jsonl lists them.
        first_skipped: The first of them, why, and where it is in the annotation file; empty if there is none.
    """

    kinds: dict[Kind, int]
    sizes: dict[Kind, int]
    skipped: int = 0
    first_skipped: str = ""


def build(
    name: str,
    source: Path,
    out: Path,
    progress: BuildProgress = lambda what, done, whole: None,
    *,
    allow_outside: bool = False,
) -> BuildResult:
    """Write a records directory; `out` appears when it is whole.

    An annotation that cannot be used is left out and listed in skipped.jsonl with its line: one that is malformed, has
    no media file, or one whose content is not media.

    Args:
        name: How the source is laid out, one of SOURCES.
        source: The folder that the source was unpacked to; for jsonl also the annotation file.
        out: The directory to write.
        progress: Called with (what, done, whole): "annotations" looked at (whole is 0: not known), "files" packed.
        allow_outside: Pack media files outside the source's folder too, which annotations may name by an absolute
            path, "..", or a symlink.

    Raises:
        DataError: The source is not laid out as `name` says, or nothing of it can be used.
        CheckpointError: `out` exists or cannot be written.
    """
    if name not in SOURCES:
        raise DataError(f"no source {name!r}; choose one of {', '.join(SOURCES)}")
    check_absent(out)
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; name the source's folder")
    tfds.disable_progress_bar()
    inside = None if allow_outside else (source if source.is_dir() else source.parent).resolve()
    with new_directory(out) as directory:
        plan = _Plan(directory / "plan")
        built = plan.fill(_looked_at(SOURCES[name](source), inside), directory / "skipped.jsonl", progress)
        if not plan.media_sizes:
            why = f"; the first: {built.first_skipped}" if built.skipped else ""
            raise DataError(f"{source}: none of its {built.skipped} annotations can be used{why}")
        digest = _write_datasets(plan, directory, progress)
        shutil.rmtree(plan.folder)
        _write_manifest(directory, name, built, digest)
    return built


class _Plan:
    """What is going to be written: in a file for each kind, as there may be millions, and the sizes of it all."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.media_sizes, self.text_sizes = array.array("q"), array.array("q")
        folder.mkdir()

    def fill(self, entries: Iterable[Entry | Skipped], skipped: Path, progress: BuildProgress) -> BuildResult:
        """Sorts entries by kind; what is left out goes to the file `skipped`."""
        media = {kind: array.array("q") for kind in KINDS}
        texts = {kind: array.array("q") for kind in KINDS}
        files = {kind: (self.folder / kind).open("w", encoding="utf-8") for kind in KINDS}
        built = BuildResult({}, {})
        with skipped.open("w", encoding="utf-8") as left_out:
            for number, entry in enumerate(entries, 1):
                if isinstance(entry, Skipped):
                    built.first_skipped = built.first_skipped or str(entry)
                    built.skipped += 1
                    left_out.write(json.dumps(dataclasses.asdict(entry)) + "\n")
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
                built.kinds[kind], built.sizes[kind] = len(media[kind]), sum(media[kind])
        return built

    def __iter__(self) -> Iterator[tuple[Annotation, Path]]:
        """What was filled in, in the order of records."""
        for kind in KINDS:
            with (self.folder / kind).open(encoding="utf-8") as file:
                for line in file:
                    name, _, turns, media_at, path = json.loads(line)
                    yield Annotation(name, kind, tuple(map(tuple, turns)), media_at), Path(path)


def _looked_at(entries: Iterator[Entry | Skipped], inside: Path | None) -> Iterator[Entry | Skipped]:
    """Entries without a usable file become skipped ones. Threads look, as on a network file system that takes long.

    inside: the folder that files must lie in, symlinks followed; None: anywhere.
    """

    def look(entry: Entry | Skipped) -> Entry | Skipped:
        if isinstance(entry, Skipped):
            return entry
        try:
            path = _resolved(entry.path, inside)
            check_media(path)
        except (DataError, MediaError) as error:
            return Skipped(entry.place, entry.annotation.id, str(error))
        return dataclasses.replace(entry, path=path)

    return map_in_order(look, entries, CHECK_AHEAD)


def _resolved(path: Path, inside: Path | None) -> Path:
    """The file that is packed, whatever becomes of symlinks meanwhile."""
    try:
        found = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a symlink to itself, before Python 3.13
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:100]})") from error
    if inside is not None and not found.is_relative_to(inside):
        raise DataError(
            f"{path}: leads outside the source's folder {inside}; move it there, or allow it with --allow-outside"
        )
    return found


def _write_datasets(plan: _Plan, directory: Path, progress: BuildProgress) -> str:
    """Writes texts/ and media/. Returns the digest of all of them: each annotation, then each file, with lengths."""
    digest = xxhash.xxh3_128()

    def hashed(data: bytes) -> bytes:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        return data

    def texts() -> Iterator[dict[str, Any]]:
        for annotation, _ in plan:
            hashed(json.dumps(dataclasses.astuple(annotation)).encode())
            yield make_text_example(annotation)

    def media() -> Iterator[dict[str, Any]]:
        read = map_in_order(lambda line: (line[0], _read(line[1])), plan, READ_AHEAD)
        for number, (annotation, data) in enumerate(read, 1):
            yield {"id": annotation.id, "media": hashed(data)}
            progress("files", number, len(plan.media_sizes))

    place = {"data_dir": directory / "tfds"}
    write_dataset(Texts(texts(), plan_shards(plan.text_sizes), **place), directory / "texts")
    write_dataset(Media(media(), plan_shards(plan.media_sizes), **place), directory / "media")
    shutil.rmtree(directory / "tfds")
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read any more ({error.strerror}); build the records again") from error


def _write_manifest(directory: Path, name: str, built: BuildResult, digest: str) -> None:
    """The last file, after all others are on disk."""
    files = sorted(path for part in ("texts", "media") for path in (directory / part).iterdir())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    packages = ("vllama-jax", "tensorflow-datasets", "array_record")
    fields = {
        "format": RECORDS_FORMAT,
        "name": name,
        "kinds": built.kinds,
        "sizes": built.sizes,
        "digest": digest,
        "skipped": built.skipped,
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "files": {str(path.relative_to(directory)): path.stat().st_size for path in files},
    }
    write_json(directory / "manifest.json", fields)
