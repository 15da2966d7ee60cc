"""Search directories of downloaded weight files, and identify the type of each file by its tensors."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from vllama_jax.convert.components import FILE_SPECS, identify_file_types, strip_wrapper_prefixes
from vllama_jax.convert.language import is_language_model, is_language_model_file
from vllama_jax.convert.weight_files import Source, looks_like_weights, open_file
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.io.paths import read_first_bytes

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
MAX_LISTED_FILES = 5  # of files that are not weights; the others are counted


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The weight files that were found.

    Attributes:
        files: The tensors of each file, by file type.
        llama: The directory of the language model, if there is one.
        notes: A line for each file, used or ignored.
    """

    files: dict[str, Source]
    llama: Path | None
    notes: list[str]


def find_weight_files(paths: Sequence[Path], given: Collection[str]) -> SearchResult:
    """Identify weight files, and search directories for them recursively.

    Symbolic links are followed. Names that start with a dot are ignored.

    Args:
        paths: Files and directories.
        given: The file types that options provide. Files of these types are ignored.

    Raises:
        CheckpointError: A path does not exist, or a file with the suffix of a weight file cannot be read.
        ConfigError: Two different files are of the same type.
    """
    candidates: dict[str, list[tuple[Path, Source | None]]] = {}
    notes: list[str] = []
    others: dict[Path, list[str]] = {root: [] for root in paths}
    entries = [(root, path) for root in paths for path in _list_entries(root)]
    for root, path in entries:
        source = None if path.is_dir() else _open_if_weights(path)
        file_types = (["llama"] if is_language_model(path) else []) if source is None else identify_file_types(source)
        if source and "llama" in file_types:
            notes.append(f"{path}: ignored, LLaMA weights without config.json; give the directory as --llama")
        elif source and not file_types:
            notes.append(f"{path}: ignored, weights of an unknown type")
        elif not file_types:
            others[root].append(str(path.relative_to(root)))
        else:
            for file_type in file_types:
                candidates.setdefault(file_type, []).append((path, source))
    used = {}
    for file_type, found in candidates.items():
        spec = FILE_SPECS[file_type]
        if file_type in given:
            notes += [f"{path}: ignored, {spec.display_name} is given" for path, _ in found]
        else:
            used[file_type] = _require_unique(file_type, found)
            option = f", as {spec.option}" if spec.option else ""
            notes.append(f"{used[file_type][0]}: {spec.description}{option}")
    sources = {file_type: source for file_type, (_, source) in used.items() if source}
    llama = used["llama"][0] if "llama" in used else None
    return SearchResult(sources, llama, [*sorted(notes), *_report_ignored(others)])


def _list_entries(root: Path) -> Iterator[Path]:
    if not root.exists():
        raise CheckpointError(f"{root}: no such file or directory; give a weight file or a directory of them")
    return _walk(root, set()) if root.is_dir() else iter([root])


def _walk(folder: Path, visited: set[Path]) -> Iterator[Path]:
    """Yield the directories of language models and model directories, and the other files one by one."""
    if (resolved := folder.resolve()) in visited:
        return
    visited.add(resolved)
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
    """Open a file, or return None if it is not a weight file.

    A file with the suffix of a weight file that cannot be read, such as a partial download or a git-lfs pointer, is a
    CheckpointError: without it the result would be another model.
    """
    has_weight_suffix = path.suffix in WEIGHT_SUFFIXES
    try:
        if has_weight_suffix or looks_like_weights(read_first_bytes(path, CheckpointError)):
            return strip_wrapper_prefixes(open_file(path))
    except CheckpointError as error:
        if has_weight_suffix:
            raise CheckpointError(f"{error}; if the model does not need this file, move it elsewhere") from error
    return None


def _require_unique(file_type: str, found: Sequence[tuple[Path, Source | None]]) -> tuple[Path, Source | None]:
    """Return the only file of a type. Links to the same file count once."""
    first, spec = found[0][0], FILE_SPECS[file_type]
    for path, _ in found[1:]:
        if not path.samefile(first):
            raise ConfigError(f"{first} and {path}: both are {spec.description}; choose one with {spec.display_name}")
    return found[0]


def _report_ignored(others: Mapping[Path, Sequence[str]]) -> Iterator[str]:
    for root, names in others.items():
        more = f" and {len(names) - MAX_LISTED_FILES} more" if len(names) > MAX_LISTED_FILES else ""
        if names:
            yield f"{root}: ignored, not weights: {', '.join(sorted(names)[:MAX_LISTED_FILES])}{more}"
