"""A directory of weight files as people release and download it → which file is which piece, by what it holds."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from vllama_jax.convert.components import FILE_SPECS, identify_file_types, strip_wrapper_prefixes
from vllama_jax.convert.language import is_language_model, is_language_model_file
from vllama_jax.convert.weight_files import Source, looks_like_weights, open_file
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.io.paths import read_first_bytes

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
MAX_LISTED_FILES = 5  # files that are no weights, named in the report; the rest are counted


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a directory holds. files: a source for each piece; llama: the language model's directory, where one is.
    report: a line for each file that was taken or left aside.
    """

    files: dict[str, Source]
    llama: Path | None
    notes: list[str]


def find_weight_files(places: Sequence[Path], given: Collection[str]) -> SearchResult:
    """Looks at files, and through directories and those in them.

    given: the pieces that options name; what is found of those is left aside.
    Raises CheckpointError for a place that is not there, and for a file that is weights by its name and cannot be read;
    ConfigError where two files are the same piece.
    """
    candidates: dict[str, list[tuple[Path, Source | None]]] = {}
    notes: list[str] = []
    others: dict[Path, list[str]] = {place: [] for place in places}
    entries = [(place, path) for place in places for path in _entries(place)]
    for place, path in entries:
        source = None if path.is_dir() else _open_if_weights(path)
        file_types = (["llama"] if is_language_model(path) else []) if source is None else identify_file_types(source)
        if source and "llama" in file_types:
            notes.append(f"{path}: ignored, LLaMA weights without their config.json; give a directory as --llama")
        elif source and not file_types:
            notes.append(f"{path}: ignored, weights of no part of this model")
        elif not file_types:
            others[place].append(str(path.relative_to(place)))
        else:
            for file_type in file_types:
                candidates.setdefault(file_type, []).append((path, source))
    taken = {}
    for file_type, found in candidates.items():
        if file_type in given:
            notes += [f"{path}: ignored, {FILE_SPECS[file_type].display_name} is given" for path, _ in found]
        else:
            taken[file_type] = _require_unique(file_type, found)
            option = f", as {FILE_SPECS[file_type].option}" if FILE_SPECS[file_type].option else ""
            notes.append(f"{taken[file_type][0]}: {FILE_SPECS[file_type].description}{option}")
    sources = {file_type: source for file_type, (_, source) in taken.items() if source}
    home = taken["llama"][0] if "llama" in taken else None
    return SearchResult(sources, home, [*sorted(notes), *_report_ignored(others)])


def _entries(place: Path) -> Iterator[Path]:
    if not place.exists():
        raise CheckpointError(f"{place}: no such file or directory; give what holds the weights")
    return _walk(place, set()) if place.is_dir() else iter([place])


def _walk(folder: Path, visited: set[Path]) -> Iterator[Path]:
    """Language models and our own model directories whole, and all other files one by one. Links are followed, hidden
    names are not."""
    if (place := folder.resolve()) in visited:
        return
    visited.add(place)
    is_model = is_language_model(folder)
    if is_model or (folder / "manifest.json").exists():
        yield folder
        if len(visited) > 1:
            return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _walk(entry, visited)
        elif not entry.name.startswith(".") and not (is_model and is_language_model_file(entry.name)):
            yield entry


def _open_if_weights(path: Path) -> Source | None:
    """The tensors of a file; None for one that is no weights.

    Raises CheckpointError for one that is weights by its name and not by what it holds: without half a download or a
    git-lfs pointer, another model would come out.
    """
    try:
        display_name = path.suffix in WEIGHT_SUFFIXES
        return (
            strip_wrapper_prefixes(open_file(path))
            if display_name or looks_like_weights(read_first_bytes(path, CheckpointError))
            else None
        )
    except CheckpointError as error:
        if display_name:
            raise CheckpointError(f"{error}; if it is no part of the model, move it away from there") from error
        return None


def _require_unique(file_type: str, found: Sequence[tuple[Path, Source | None]]) -> tuple[Path, Source | None]:
    """The one file of a kind; the same file under two names is one."""
    first = found[0][0]
    for path, _ in found[1:]:
        if not path.samefile(first):
            raise ConfigError(
                f"{first} and {path}: both are {FILE_SPECS[file_type].description}; say which with "
                f"{FILE_SPECS[file_type].display_name}"
            )
    return found[0]


def _report_ignored(others: Mapping[Path, Sequence[str]]) -> Iterator[str]:
    for place, names in others.items():
        more = f" and {len(names) - MAX_LISTED_FILES} more" if len(names) > MAX_LISTED_FILES else ""
        if names:
            yield f"{place}: ignored, no weights: {', '.join(sorted(names)[:MAX_LISTED_FILES])}{more}"
