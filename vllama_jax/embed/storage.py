"""Write features to one file with an index: `vllama embed`.

OUT            safetensors or npz; an array for each output, with the rows of all files in their order
OUT's .json    the index: model, options, shapes, and for each file its times and rows, or why it cannot be used

Until the output is complete, it is in the directory .OUT.partial: rows are appended to a file for each output, and then
a line to index.jsonl. A killed command loses the batches that it was processing. Run again, it resumes after the last
line.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllama_jax.checkpoints.directory import ModelDirectory
from vllama_jax.config import describe_changes
from vllama_jax.embed.files import EmbedOptions, FileFeatures, check_options, embed_files, load_encoders
from vllama_jax.embed.outputs import Output, select_outputs
from vllama_jax.errors import CheckpointError, ConfigError, DataError
from vllama_jax.io.atomic import check_absent, ensure_directory, lock_directory, replace_json
from vllama_jax.io.json_files import read_object
from vllama_jax.io.jsonl import AtomicWriteFile, JsonLinesFile
from vllama_jax.io.paths import require_local_output
from vllama_jax.model import remove_missing_branches

INDEX_FORMAT = 1
SUFFIXES = (".safetensors", ".npz")
DTYPE = np.dtype("float32")  # npz has no bfloat16

FileProgress = Callable[[int, int], None]  # files done, files in total


@dataclasses.dataclass(frozen=True)
class WrittenFeatures:
    """The output of `write_features`.

    Attributes:
        shapes: The shape of each array.
        num_files: The number of files, without repetitions.
        errors: Why files cannot be used, one line for each of them.
    """

    shapes: dict[str, tuple[int, ...]]
    num_files: int
    errors: list[str]


def write_features(
    directory: ModelDirectory,
    files: Sequence[str | Path],
    out: Path,
    options: EmbedOptions,
    dtype: str | None = None,
    progress: FileProgress = lambda done, total: None,
) -> WrittenFeatures:
    """Write features of media files and their index, or resume after an interruption.

    Args:
        directory: The model.
        files: Video, image and audio files.
        out: The file to write, .safetensors or .npz. The index is next to it, with the suffix .json.
        options: The options. `batch_size` may change when a command is resumed, the others may not.
        dtype: Dtype of weights and computation; see `load_encoders`. The output is always float32.
        progress: Called with the number of files that are done, and of all.

    Returns:
        What the output contains.

    Raises:
        CheckpointError: The output exists, cannot be written, or another process is writing it.
        ConfigError: An option does not fit the model, `out` has another suffix, or there is partial output of other
            options, files or weights.
        DataError: None of the files can be used, or partial output is corrupt.
    """
    from vllama_jax.nn.network import default_dtype

    out, directory = require_local_output(out), remove_missing_branches(directory)
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"out must be a file name with the suffix {' or '.join(SUFFIXES)}, not {out}")
    outputs = select_outputs(directory.config, options.features)
    check_options(directory.config, outputs, options)
    names = list(dict.fromkeys(os.fspath(file) for file in files))
    settings = {
        "format": INDEX_FORMAT,
        "model": directory.digest,
        "features": list(dict.fromkeys(output.feature for output in outputs)),
        "num_frames": options.num_frames or directory.config.num_frames,
        "audio": options.audio,
        "dtype": dtype or default_dtype(),
    }
    with _open_partial(out, settings, names, outputs) as partial:
        progress(len(partial.lines), len(names))
        if remaining := names[len(partial.lines) :]:
            model = load_encoders(directory, options.features, dtype)
            for record in embed_files(model, remaining, **dataclasses.asdict(options)):
                partial.add(record)
                progress(len(partial.lines), len(names))
        errors = [line["error"] for line in partial.lines if "error" in line]
        if len(errors) == len(names):
            partial.remove()
            raise DataError(f"none of {len(names)} files can be used; the first: {errors[0]}" if names else "no files")
        partial.finish({"path": str(directory.opened_path), "digest": directory.digest})
        return WrittenFeatures(partial.shapes, len(names), errors)


@contextlib.contextmanager
def _open_partial(
    out: Path, settings: dict[str, Any], names: Sequence[str], outputs: Sequence[Output]
) -> Iterator["_PartialFeatures"]:
    """Create the partial directory of an output, or open it if its settings and files are the same, and lock it."""
    folder = out.with_name(f".{out.name}.partial")
    try:
        _check_absent(out, folder)
        ensure_directory(folder)
        busy_message = f"{out}: another process is writing it; wait until it has finished"
        with lock_directory(folder, busy_message), contextlib.ExitStack() as stack:
            _check_absent(out, folder)  # again: another process may have finished in the meantime
            partial = _PartialFeatures(out, folder, outputs)
            partial.set_settings({**settings, "files": [[name, *_stat(name)] for name in names]})
            stack.callback(partial.close)
            yield partial
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be written ({error.strerror or error}); run the same command again to resume"
        ) from error


def _check_absent(out: Path, folder: Path) -> None:
    """Raise CheckpointError if the output exists, unless a killed command was about to complete it."""
    if not (folder / "index.json").exists():
        check_absent(out)
        check_absent(out.with_suffix(".json"))


def _stat(name: str) -> tuple[int, int]:
    """Return the size of a file in bytes and the time of its last change in ns; zeros if it is missing."""
    try:
        found = os.stat(name)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


class _PartialFeatures:
    """The files of an output that is not complete.

    Args:
        out: The output.
        folder: Its partial directory, which exists and is locked.
        outputs: The outputs that each file may have.

    Attributes:
        lines: The lines of index.jsonl, one for each file that is done.

    Raises:
        DataError: index.jsonl is corrupt.
    """

    def __init__(self, out: Path, folder: Path, outputs: Sequence[Output]):
        self._out, self._folder = out, folder
        self._row_shapes = {output.name: output.row_shape for output in outputs}
        self._settings: dict[str, Any] = {}
        self._index = JsonLinesFile(folder / "index.jsonl")
        self._files: dict[str, AtomicWriteFile] = {}
        self.lines = self._index.read()
        self._num_rows = dict.fromkeys(self._row_shapes, 0)

    def set_settings(self, settings: dict[str, Any]) -> None:
        """Store the settings, or check that they are those of the lines that exist, and open the files of rows.

        Raises:
            ConfigError: The lines were written with other settings, weights or files.
            DataError: A file is corrupt.
        """
        path = self._folder / "settings.json"
        if not self.lines:
            replace_json(path, settings)
        elif changes := _list_changes(read_object(path, DataError, self._advice), settings):
            raise ConfigError(
                f"{self._out}: partly written with other settings ({'; '.join(changes)}); run the same command again "
                f"to complete it, or remove {self._folder}"
            )
        self._settings = {name: value for name, value in settings.items() if name != "files"}
        self._num_rows = {name: self._count_rows(name) for name in self._row_shapes}
        if not self._index_path.exists():
            self._files = {name: self._open_rows(name) for name in self._row_shapes}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array."""
        return {name: (self._num_rows[name], *shape) for name, shape in self._row_shapes.items()}

    @property
    def _index_path(self) -> Path:
        """The complete index. It exists once the arrays are complete."""
        return self._folder / "index.json"

    @property
    def _advice(self) -> str:
        return f"remove {self._folder} and run the command again"

    def _rows_path(self, name: str) -> Path:
        return self._folder / f"{name}.bin"

    def _count_rows(self, name: str) -> int:
        """Return the number of rows of all lines. Raises DataError for a line that this module did not write."""
        try:
            return max((int(line["rows"][name][1]) for line in self.lines if name in line.get("rows", ())), default=0)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"{self._folder / 'index.jsonl'}: corrupt; {self._advice}") from error

    def _open_rows(self, name: str) -> AtomicWriteFile:
        """Open the file of an output's rows, and remove those of a batch that was interrupted."""
        path, size = self._rows_path(name), math.prod(self.shapes[name]) * DTYPE.itemsize
        file = AtomicWriteFile(path, "a")
        if (found := os.fstat(file.fileno()).st_size) < size:
            file.close()
            raise DataError(f"{path}: has {found} of {size} bytes; {self._advice}")
        file.truncate(size)
        return file

    def add(self, record: FileFeatures) -> None:
        """Append the features of the next file."""
        rows = {}
        for name, array in record.arrays.items():
            array = np.ascontiguousarray(array.reshape(-1, *self._row_shapes[name]), DTYPE)
            self._files[name].write(array.data)
            rows[name] = [self._num_rows[name], self._num_rows[name] + len(array)]
            self._num_rows[name] += len(array)
        line = _describe(record, rows)
        self._index.add(line)
        self.lines.append(line)

    def close(self) -> None:
        """Close all files. Without lines, there is nothing to resume, and they are removed."""
        for file in self._files.values():
            file.close()
        if not self.lines:
            self.remove()

    def remove(self) -> None:
        """Remove the partial directory."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def finish(self, model: Mapping[str, str]) -> None:
        """Write the output and the index, and remove the partial directory. The index appears last."""
        arrays = self._folder / f"arrays{self._out.suffix}"
        if not self._index_path.exists():
            _write_arrays(arrays, {name: self._read_rows(name) for name in self._row_shapes})
            about = {"model": model, "arrays": self._out.name, "shapes": self.shapes, "files": self.lines}
            replace_json(self._index_path, self._settings | about)
        if arrays.exists():  # otherwise a killed command has moved it
            os.replace(arrays, self._out)
        for name in self._row_shapes:
            self._rows_path(name).unlink(missing_ok=True)
        os.replace(self._index_path, self._out.with_suffix(".json"))
        self.remove()

    def _read_rows(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        return np.memmap(self._rows_path(name), DTYPE, "r", shape=shape) if shape[0] else np.zeros(shape, DTYPE)


def _list_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the differences between two settings as messages, such as "audio was True, now False"."""
    own_messages = {"model": "the weights of the model differ", "files": "the files differ"}
    changes = [message for name, message in own_messages.items() if before.get(name) != now[name]]
    plain = ({name: value for name, value in fields.items() if name not in own_messages} for fields in (before, now))
    return changes + describe_changes(*plain)


def _describe(record: FileFeatures, rows: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return a file's entry in the index."""
    if record.report is None:
        return {"file": record.file, "error": record.error}
    report = {name: value for name, value in dataclasses.asdict(record.report).items() if name != "path"}
    return {
        "file": record.file,
        **report,
        "timestamps": [round(second, 6) for second in record.timestamps],
        "clip_starts": [round(second, 6) for second in record.clip_starts],
        "rows": rows,
    }


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors or npz file of arrays that may be larger than memory."""
    from vllama_jax.convert.write_tensors import Tensor, write_safetensors

    if path.suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # mypy takes an array for `allow_pickle`
            file.flush()
            os.fsync(file.fileno())
        return
    tensors = [
        Tensor(name, array.shape, array.dtype, functools.partial(np.asarray, array)) for name, array in arrays.items()
    ]
    write_safetensors(path, tensors, lambda count: None)
