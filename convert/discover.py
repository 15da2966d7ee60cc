"""A directory of weight files as people release and download it → which file is which piece, by what it holds."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from vllama_jax.convert.components import PIECES, recognise, unwrapped
from vllama_jax.convert.language import is_language_model, is_language_model_file
from vllama_jax.convert.weight_files import Source, looks_like_weights, open_file
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.io.paths import first_bytes

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
NAMED_OTHERS = 5  # files that are no weights, named in the report; the rest are counted


@dataclasses.dataclass(frozen=True)
class Found:
    """What a directory holds. files: a source for each piece; llama: the language model's directory, where one is.
    report: a line for each file that was taken or left aside.
    """

    files: dict[str, Source]
    llama: Path | None
    report: list[str]


def search(places: Sequence[Path], given: Collection[str]) -> Found:
    """Looks at files, and through directories and those in them.

    given: the pieces that options name; what is found of those is left aside.
    Raises CheckpointError for a place that is not there, and for a file that is weights by its name and cannot be read;
    ConfigError where two files are the same piece.
    """
    candidates: dict[str, list[tuple[Path, Source | None]]] = {}
    report: list[str] = []
    others: dict[Path, list[str]] = {place: [] for place in places}
    entries = [(place, path) for place in places for path in _entries(place)]
    for place, path in entries:
        source = None if path.is_dir() else _opened(path)
        kinds = (["llama"] if is_language_model(path) else []) if source is None else recognise(source)
        if source and "llama" in kinds:
            report.append(f"{path}: ignored, LLaMA weights without their config.json; give a directory as --llama")
        elif source and not kinds:
            report.append(f"{path}: ignored, weights of no part of this model")
        elif not kinds:
            others[place].append(str(path.relative_to(place)))
        else:
            for kind in kinds:
                candidates.setdefault(kind, []).append((path, source))
    taken = {}
    for kind, found in candidates.items():
        if kind in given:
            report += [f"{path}: ignored, {PIECES[kind].named} is given" for path, _ in found]
        else:
            taken[kind] = _only(kind, found)
            option = f", as {PIECES[kind].option}" if PIECES[kind].option else ""
            report.append(f"{taken[kind][0]}: {PIECES[kind].what}{option}")
    sources = {kind: source for kind, (_, source) in taken.items() if source}
    home = taken["llama"][0] if "llama" in taken else None
    return Found(sources, home, [*sorted(report), *_ignored(others)])


def _entries(place: Path) -> Iterator[Path]:
    if not place.exists():
        raise CheckpointError(f"{place}: no such file or directory; give what holds the weights")
    return _walk(place, set()) if place.is_dir() else iter([place])


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Language models and our own model directories whole, and all other files one by one. Links are followed, hidden
    names are not."""
    if (place := folder.resolve()) in seen:
        return
    seen.add(place)
    is_model = is_language_model(folder)
    if is_model or (folder / "manifest.json").exists():
        yield folder
        if len(seen) > 1:
            return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _walk(entry, seen)
        elif not entry.name.startswith(".") and not (is_model and is_language_model_file(entry.name)):
            yield entry


def _opened(path: Path) -> Source | None:
    """The tensors of a file; None for one that is no weights.

    Raises CheckpointError for one that is weights by its name and not by what it holds: without half a download or a
    git-lfs pointer, another model would come out.
    """
    try:
        named = path.suffix in WEIGHT_SUFFIXES
        return unwrapped(open_file(path)) if named or looks_like_weights(first_bytes(path, CheckpointError)) else None
    except CheckpointError as error:
        if named:
            raise CheckpointError(f"{error}; if it is no part of the model, move it away from there") from error
        return None


def _only(kind: str, found: Sequence[tuple[Path, Source | None]]) -> tuple[Path, Source | None]:
    """The one file of a kind; the same file under two names is one."""
    first = found[0][0]
    for path, _ in found[1:]:
        if not path.samefile(first):
            raise ConfigError(f"{first} and {path}: both are {PIECES[kind].what}; say which with {PIECES[kind].named}")
    return found[0]


def _ignored(others: Mapping[Path, Sequence[str]]) -> Iterator[str]:
    for place, names in others.items():
        more = f" and {len(names) - NAMED_OTHERS} more" if len(names) > NAMED_OTHERS else ""
        if names:
            yield f"{place}: ignored, no weights: {', '.join(sorted(names)[:NAMED_OTHERS])}{more}"
