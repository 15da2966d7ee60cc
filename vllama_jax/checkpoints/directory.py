"""Open model directories and run directories, without reading their weights.

config.json    the model's config
tokenizer/     the tokenizer's files
params/        the weights in Orbax's layout: an uncompressed zarr array for each
manifest.json  the source files, and the shape, dtype and xxh3_128 of each weight

A run directory (train/run_directory.py) is opened as the model that the run trained: the weights of its base model,
some of which are replaced by those that the run trained.
"""

import dataclasses
import functools
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vllama_jax.checkpoints.arrays import check_manifest
from vllama_jax.checkpoints.digests import DIGESTS, check_checkpoint, list_checkpoint_steps
from vllama_jax.checkpoints.hub_models import find_hub_model
from vllama_jax.checkpoints.shipped import is_shipped, is_shipped_digest, shipped_model
from vllama_jax.checkpoints.store_arrays import open_arrays
from vllama_jax.config import NO_LORA, LoraConfig, VideoLlamaConfig, from_dict, to_dict
from vllama_jax.errors import CheckpointError, format_error
from vllama_jax.io.atomic import replace_json, write_json
from vllama_jax.io.hub import is_hub_address
from vllama_jax.io.json_fields import LARGEST_INTEGER, format_value
from vllama_jax.io.json_files import parse_object, read_object
from vllama_jax.io.paths import as_path, is_directory, is_store_path
from vllama_jax.io.store_cache import copy_files, copy_folder
from vllama_jax.io.store_path import NO_BUCKET, StorePath

if TYPE_CHECKING:
    from vllama_jax.text.tokenizer import Tokenizer

MODEL_FORMAT = 1
OCDBT_MANIFEST = "manifest.ocdbt"  # of arrays that Orbax wrote to a local run directory
PYTORCH_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")


def write_config(directory: Path, config: VideoLlamaConfig, **fields: Any) -> None:
    """Write config.json.

    Args:
        directory: The model or run directory.
        config: The model's config.
        **fields: Additional fields, as runs have them.
    """
    versions = {name: importlib.metadata.version(name) for name in ("vllama-jax", "jax", "flax", "orbax-checkpoint")}
    content = {"format": MODEL_FORMAT, "versions": versions, "model": to_dict(config), **fields}
    replace_json(directory / "config.json", content)


def write_manifest(directory: Path, sources: dict[str, Any], leaves: dict[str, dict], **fields: Any) -> None:
    """Write manifest.json.

    Args:
        directory: The model directory.
        sources: The files that the weights were converted from, as lists by component.
        leaves: Shape, dtype and xxh3_128 of each weight, by path.
        **fields: Additional fields, as quantized models have them.
    """
    write_json(directory / "manifest.json", {"format": MODEL_FORMAT, "sources": sources, "leaves": leaves, **fields})


@dataclasses.dataclass(frozen=True)
class TrainedWeights:
    """The weights that a run trained, in its last checkpoint.

    Attributes:
        path: The folder with the weights in the checkpoint.
        leaves: Shapes by path.
        dtypes: Names of dtypes by path.
        lora: The run's config of LoRA.
    """

    path: Path
    leaves: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    lora: LoraConfig

    @property
    def save_id(self) -> bytes:
        """Bytes that identify a save: equal for copies, and different for other saves. Raises CheckpointError."""
        try:
            manifest = self.path / OCDBT_MANIFEST
            return (manifest if manifest.exists() else self.path.parent / DIGESTS).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseReference:
    """The base model in the config.json of a run: its directory, and the digest of its weights."""

    path: str
    digest: str


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """A run directory, whose checkpoints are not read yet.

    Attributes:
        path: The run directory.
        base: The present directory of the base model.
        base_digest: The digest of the weights of the base model.
        lora: The run's config of LoRA.
    """

    path: Path
    base: Path
    base_digest: str
    lora: LoraConfig


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """A valid model directory, and the weights of the runs that trained on top of it. No weights are read yet.

    Attributes:
        path: The model directory.
        config: The model's config.
        manifest: The content of manifest.json.
        trained: The weights of the runs in the order of training. Later weights replace earlier ones.
    """

    path: Path
    config: VideoLlamaConfig
    manifest: dict[str, Any]
    trained: tuple[TrainedWeights, ...] = ()

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, which is loaded on first use."""
        from vllama_jax.text.tokenizer import load_tokenizer

        return load_tokenizer(self.tokenizer_directory)

    @functools.cached_property
    def tokenizer_directory(self) -> Path:
        """The tokenizer's files; of a model on an object store a local copy, as tokenizers read local files only."""
        path = self.path / "tokenizer"
        if is_store_path(path):
            return _copy_to_cache(path, json.dumps(self.manifest, sort_keys=True).encode())
        return path

    @property
    def opened_path(self) -> Path:
        """The directory that was opened: that of the last run, or the model directory."""
        return self.trained[-1].path.parent.parent if self.trained else self.path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all weights, by path."""
        shapes = {path: tuple(leaf["shape"]) for path, leaf in self.manifest["leaves"].items()}
        return shapes | {path: shape for trained in self.trained for path, shape in trained.leaves.items()}

    @functools.cached_property
    def trained_by(self) -> dict[str, TrainedWeights]:
        """For each weight that a run trained, the last one that did, by path."""
        return {path: trained for trained in self.trained for path in trained.leaves}

    @property
    def lora(self) -> LoraConfig:
        """The config of the LoRA updates that a run trained. It is not in `config`, because `load` merges them."""
        return next((trained.lora for trained in self.trained if trained.lora.rank), NO_LORA)

    @property
    def quantized(self) -> str | None:
        """The quantization of the large kernels, "int8" or "int4"; None if the model is not quantized."""
        return self.manifest.get("quantized")

    @property
    def digest(self) -> str:
        """The digest of all weights, by which a run refers to its base model."""
        import xxhash

        leaves = json.dumps(self.manifest["leaves"], sort_keys=True).encode()
        return xxhash.xxh3_128_hexdigest(b"".join([leaves, *(trained.save_id for trained in self.trained)]))


def open_model(path: str | Path, base: str | Path | None = None) -> ModelDirectory:
    """Open a model directory, or a run directory and its base model.

    Checks the digests of the weights that runs trained.

    Args:
        path: The model or run directory, or one of the names of `find_model`.
        base: The base model of the run, if it has moved since the run's config.json was written.

    Raises:
        CheckpointError: `path` is neither a model nor a run directory, has a newer format, or is a run with another
            base model or a corrupt last checkpoint.
        ConfigError: config.json has missing, unknown or invalid fields.
    """
    runs, model = find_runs(path, base)
    directory = _open_model_directory(model)
    for run in reversed(runs):
        if directory.digest != run.base_digest:
            raise CheckpointError(
                f"{run.base}: not the base model that {run.path} was trained on; set the right one with --base"
            )
        trained = open_trained_weights(_find_last_weights(run.path), run.lora)
        directory = dataclasses.replace(directory, trained=(*directory.trained, trained))
    return directory


def find_model(path: str | Path) -> Path:
    """Return the model or run directory that a user names.

    Args:
        path: A directory, also on an object store. "miniature" is the model that is part of the package, unless there
            is a model or run directory of that name. hf://org/name[@revision] is a repository on the Hugging Face Hub,
            which is downloaded, and converted if it has PyTorch files (`hub_models`).

    Raises:
        CheckpointError: The repository cannot be downloaded or has no model, or the miniature cannot be unpacked.
    """
    if is_hub_address(path):
        return find_hub_model(str(path))
    return shipped_model() if is_shipped(path) else as_path(path)


def find_runs(path: str | Path, base: str | Path | None = None) -> tuple[list[RunDirectory], Path]:
    """Find a run, the runs that it started from, and their model directory, without opening weights.

    Args:
        path: The model or run directory.
        base: The base model of the run, if it has moved.

    Returns:
        The runs, the last one first, and the model directory that the first one started from.

    Raises:
        CheckpointError: `path` is neither a model nor a run directory, or a base model is not found.
        ConfigError: A run's config.json has invalid fields.
    """
    path = find_model(path)
    runs: list[RunDirectory] = []
    while "base" in (fields := read_config(path)):
        if any(path.samefile(run.path) for run in runs):
            raise CheckpointError(
                f"{path / 'config.json'}: the run is its own base model; set the right one with --base"
            )
        runs.append(_open_run(path, fields, base))
        path, base = runs[-1].base, None
    return runs, path


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json of a model or run directory.

    Args:
        path: The directory.

    Raises:
        CheckpointError: The directory or its config.json does not exist, or has an unknown format.
    """
    if is_store_path(path):
        return _read_store_config(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: a file, not a model directory; create a model directory with `vllama convert`"
            if path.exists()
            else f"{path}: no such model directory; create one with `vllama convert`"
        )
    fields = read_object(path / "config.json") if (path / "config.json").exists() else None
    if not (fields and "format" in fields) and (weights := _find_pytorch_weights(path)):
        raise CheckpointError(f"{path}: contains PyTorch weights ({weights}); convert them with `vllama convert`")
    if fields is None:
        raise CheckpointError(f"{path}: not a model directory (no config.json in it); create one with `vllama convert`")
    _check_format(path / "config.json", fields, "model")
    return fields


def _read_store_config(path: StorePath) -> dict[str, Any]:
    """Read config.json of a directory on an object store, which is complete if its manifest, written last, exists."""
    try:
        content = (path / "config.json").read_bytes()
        fields = parse_object(content, str(path / "config.json"), CheckpointError)
        complete = "base" in fields or (path / "manifest.json").exists()
    except FileNotFoundError as error:
        why = NO_BUCKET if error.strerror == NO_BUCKET else "no config.json in it"
        raise CheckpointError(f"{path}: not a model directory ({why}); create one with `vllama convert`") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not complete:
        raise CheckpointError(
            f"{path}: incomplete (no manifest.json, which is written last); copy or convert the model again"
        )
    _check_format(path / "config.json", fields, "model")
    return fields


def _open_run(path: Path, fields: dict[str, Any], base: str | Path | None) -> RunDirectory:
    """Find the base model of a run: `base`, or the path in config.json, or the miniature, or a sibling of the run."""
    where, config = path / "config.json", fields.get("run")
    recorded = from_dict(fields["base"], BaseReference, f"{where}: base")
    lora = config.get("lora") if isinstance(config, dict) else None
    directory = find_model(base or recorded.path)
    sibling = path.absolute().parent / directory.name  # its path if both were moved
    if not base and not is_directory(directory):
        # The cache folder with the unpacked miniature may have been removed, or be elsewhere on this machine.
        if is_shipped_digest(recorded.digest):
            directory = shipped_model()
        elif is_directory(sibling):
            directory = sibling
    if not is_directory(directory):
        raise CheckpointError(
            f"{path}: its base model {directory} was not found, and is not in the run's parent folder; set its path "
            "with --base"
        )
    return RunDirectory(
        path, directory, recorded.digest, from_dict(lora, LoraConfig, f"{where}: run.lora", range(LARGEST_INTEGER + 1))
    )


def _open_model_directory(path: Path) -> ModelDirectory:
    for name in ("manifest.json", "params", "tokenizer"):
        if not (path / name).exists():
            raise CheckpointError(f"{path}: not a model directory (no {name} in it); create one with `vllama convert`")
    manifest = read_object(path / "manifest.json")
    _check_format(path / "manifest.json", manifest, "leaves")
    check_manifest(manifest["leaves"], str(path / "manifest.json"))
    if not _are_valid_sources(manifest.get("sources")):
        raise CheckpointError(f"{path / 'manifest.json'}: sources must be lists of files; convert the model again")
    return ModelDirectory(path, _read_model_config(path, read_config(path)), manifest)


def _find_pytorch_weights(directory: Path) -> str:
    """Return the name of a file with PyTorch weights in a directory or its subfolders; "" if there is none."""
    folders = [directory, *(entry for entry in sorted(directory.iterdir()) if entry.is_dir())]
    files = (entry for folder in folders for entry in sorted(folder.iterdir()) if entry.suffix in PYTORCH_SUFFIXES)
    return next((str(file.relative_to(directory)) for file in files), "")


def _are_valid_sources(sources: Any) -> bool:
    """Return whether a manifest's sources are lists of files with names, by component."""
    lists = list(sources.values()) if isinstance(sources, dict) else [None]
    return all(
        isinstance(files, list) and all(isinstance(file, dict) and isinstance(file.get("name"), str) for file in files)
        for files in lists
    )


def _read_model_config(path: Path, fields: dict[str, Any]) -> VideoLlamaConfig:
    return from_dict(fields["model"], VideoLlamaConfig, f"{path / 'config.json'}: model")


def _find_last_weights(run: Path) -> Path:
    """Return the folder with the weights in a run's last checkpoint. Raises CheckpointError if they are corrupt."""
    steps = list_checkpoint_steps(run)
    if not steps:
        raise CheckpointError(f"{run}: the run has no checkpoint yet; continue it until it saves one")
    name = f"step_{steps[-1]}"
    try:
        check_checkpoint(run / name, "weights")
    except CheckpointError as error:
        advice = f"rename {name} to damaged_{name} to use step_{steps[-2]}" if len(steps) > 1 else "copy it again"
        raise CheckpointError(f"{run}: its last checkpoint, {name}, is corrupt ({error}); {advice}") from error
    return run / name / "weights"


def open_trained_weights(weights: Path, lora: LoraConfig) -> TrainedWeights:
    """Read the shapes and dtypes of the weights in a checkpoint.

    Args:
        weights: The folder with the weights.
        lora: The run's config of LoRA.

    Raises:
        CheckpointError: Orbax cannot read them.
    """
    import orbax.checkpoint as ocp
    from flax.traverse_util import flatten_dict

    try:
        local = weights
        if is_store_path(weights):
            if not (weights / OCDBT_MANIFEST).exists():
                arrays = open_arrays(weights)
                shapes = {path: array.shape for path, array in arrays.items()}
                dtypes = {path: array.dtype.name for path, array in arrays.items()}
                return TrainedWeights(cast(Path, weights), shapes, dtypes, lora)
            local = copy_store_arrays(weights)
        handler = ocp.PyTreeCheckpointHandler(enable_pinned_host_transfer=False)  # else it initializes devices
        leaves = flatten_dict(handler.metadata(local.absolute()).tree, sep="/")
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        return TrainedWeights(weights, shapes, {path: leaf.dtype.name for path, leaf in leaves.items()}, lora)
    except Exception as error:  # Orbax raises errors of every type
        raise CheckpointError(f"{weights}: cannot be read ({format_error(error)})") from error


def copy_store_arrays(directory: StorePath) -> Path:
    """Copy arrays in OCDBT, as local runs have them, to the cache folder: Orbax reads no store but gs://.

    Raises:
        CheckpointError: They cannot be copied.
    """
    try:
        return _copy_to_cache(directory, (directory / OCDBT_MANIFEST).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error.strerror})") from error


def _copy_to_cache(directory: StorePath, identity: bytes) -> Path:
    folder = copy_folder(directory, identity)
    try:
        sizes = directory.file_sizes()
        copy_files(directory, sizes, sizes, folder)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be copied to this machine ({error.strerror})") from error
    return folder


def _check_format(path: Path | StorePath, fields: dict[str, Any], needed: str) -> None:
    """Raise CheckpointError unless a file has the current format and the object `needed`."""
    version = fields.get("format")
    if isinstance(version, int) and version > MODEL_FORMAT:
        raise CheckpointError(
            f"{path}: its format {format_value(version)} is newer than this version's {MODEL_FORMAT}; update vllama-jax"
        )
    if version != MODEL_FORMAT:
        raise CheckpointError(
            f"{path}: unknown format {format_value(version)}, expected {MODEL_FORMAT}; convert the model again"
        )
    if not isinstance(fields.get(needed), dict):
        raise CheckpointError(f"{path}: {needed!r} is missing or is not an object; convert the model again")
