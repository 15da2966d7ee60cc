"""Model directories: written layer by layer, restored by Orbax straight into their shards.

config.json   what the model is          params/         Orbax layout, one zarr array a leaf, uncompressed
tokenizer/    the tokenizer's files       manifest.json   sources, and each leaf's shape, dtype and xxh3_128

A run directory (train/run_directory.py) is read as the model that was trained: its base's weights, but for those that
it trained.
"""

import dataclasses
import functools
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllama_jax.checkpoints.arrays import check_manifest
from vllama_jax.checkpoints.digests import DIGESTS, check_checkpoint, list_checkpoint_steps
from vllama_jax.checkpoints.shipped import find_model, is_shipped_digest, shipped_model
from vllama_jax.checkpoints.store_arrays import open_arrays
from vllama_jax.config import NO_LORA, LoraConfig, VideoLlamaConfig, from_dict, to_dict
from vllama_jax.errors import CheckpointError, format_error
from vllama_jax.io.atomic import replace_json, write_json
from vllama_jax.io.json_fields import LARGEST_INTEGER, format_value
from vllama_jax.io.json_files import parse_object, read_object
from vllama_jax.io.paths import is_store_path
from vllama_jax.io.store_cache import copy_files, copy_folder
from vllama_jax.io.store_path import StorePath

if TYPE_CHECKING:
    from vllama_jax.text.tokenizer import Tokenizer

MODEL_FORMAT = 1
OCDBT_MANIFEST = "manifest.ocdbt"  # of arrays that Orbax wrote to a local run directory
PYTORCH_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")


def write_config(directory: Path, config: VideoLlamaConfig, **more: Any) -> None:
    """config.json; a run has `more` to say in it."""
    versions = {name: importlib.metadata.version(name) for name in ("vllama-jax", "jax", "flax", "orbax-checkpoint")}
    fields = {"format": MODEL_FORMAT, "versions": versions, "model": to_dict(config), **more}
    replace_json(directory / "config.json", fields)


def write_manifest(directory: Path, sources: dict[str, Any], leaves: dict[str, dict], **more: Any) -> None:
    """manifest.json; that of quantised weights has `more` to say."""
    write_json(directory / "manifest.json", {"format": MODEL_FORMAT, "sources": sources, "leaves": leaves, **more})


@dataclasses.dataclass(frozen=True)
class TrainedWeights:
    """Weights that a run trained. path: of its checkpoint. leaves: their shapes. dtypes: the names of theirs."""

    path: Path
    leaves: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    lora: LoraConfig

    @property
    def save_id(self) -> bytes:
        """Bytes that differ from save to save, and not from copy to copy. Raises CheckpointError."""
        try:
            manifest = self.path / OCDBT_MANIFEST
            return (manifest if manifest.exists() else self.path.parent / DIGESTS).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseReference:
    """The base model of a run, as its config.json has it: the directory, and the digest of all weights."""

    path: str
    digest: str


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """A run directory whose checkpoints are not looked at yet. base: where its base model is now."""

    path: Path
    base: Path
    base_digest: str
    lora: LoraConfig


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """A model directory that was found to be one, and what runs trained on top of it; the last of those wins.

    Nothing of its weights is read yet.
    """

    path: Path
    config: VideoLlamaConfig
    manifest: dict[str, Any]
    trained: tuple[TrainedWeights, ...] = ()

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer":
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
        """The directory that this was opened as: the last run's, or the model's own."""
        return self.trained[-1].path.parents[1] if self.trained else self.path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight, by path."""
        shapes = {path: tuple(leaf["shape"]) for path, leaf in self.manifest["leaves"].items()}
        return shapes | {path: shape for trained in self.trained for path, shape in trained.leaves.items()}

    @functools.cached_property
    def trained_by(self) -> dict[str, TrainedWeights]:
        """For each weight that runs trained, by path, the run that trained it last."""
        return {path: trained for trained in self.trained for path in trained.leaves}

    @property
    def lora(self) -> LoraConfig:
        """The low-rank updates that a run trained; they are no part of `config`, because `load` merges them."""
        return next((trained.lora for trained in self.trained if trained.lora.rank), NO_LORA)

    @property
    def quantized(self) -> str | None:
        """How its large kernels are quantised, as checkpoints/quantize.py does it; None where they are not."""
        return self.manifest.get("quantized")

    @property
    def digest(self) -> str:
        """Of all weights: what a run that starts from them refers to."""
        import xxhash

        leaves = json.dumps(self.manifest["leaves"], sort_keys=True).encode()
        return xxhash.xxh3_128_hexdigest(b"".join([leaves, *(trained.save_id for trained in self.trained)]))


def open_model(path: str | Path, base: str | Path | None = None) -> ModelDirectory:
    """Open a model directory, or a run directory together with its base model.

    "miniature" is the model that comes with the package, unless there is a model or run directory of that name.

    The weights that runs trained are compared with their digests, so that they are read from intact files only.

    Args:
        path: The model or run directory.
        base: The base model of the run, if it is no longer where the run's config.json has it.

    Raises:
        CheckpointError: `path` is neither, is of a newer format, is a run whose base is not the one that it was
            trained on, or is a run whose last checkpoint is damaged.
        ConfigError: Its config.json has fields that are missing, unknown or of another type.
    """
    runs, model = find_runs(path, base)
    directory = _open_model_directory(model)
    for run in reversed(runs):
        if directory.digest != run.base_digest:
            raise CheckpointError(
                f"{run.base}: not the base model that {run.path} was trained on; name that one with --base"
            )
        trained = open_trained_weights(_last_weights(run.path), run.lora)
        directory = dataclasses.replace(directory, trained=(*directory.trained, trained))
    return directory


def find_runs(path: str | Path, base: str | Path | None = None) -> tuple[list[RunDirectory], Path]:
    """Find the runs that `path` consists of, the last one first, and the model directory that the first started from.

    No weight is looked at. Raises as `open_model` does for what is neither a model directory nor a run.
    """
    path = find_model(path)
    runs: list[RunDirectory] = []
    while "base" in (fields := read_config(path)):
        if any(path.samefile(run.path) for run in runs):
            raise CheckpointError(f"{path / 'config.json'}: the run is its own base model; name the right one: --base")
        runs.append(_run(path, fields, base))
        path, base = runs[-1].base, None
    return runs, path


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json of a model or run directory. Raises CheckpointError when there is none of a known format."""
    if is_store_path(path):
        return _read_store_config(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: a file, not a model directory; `vllama convert` makes one of PyTorch weights"
            if path.exists()
            else f"{path}: no such model directory; `vllama convert` makes one"
        )
    fields = read_object(path / "config.json") if (path / "config.json").exists() else None
    if not (fields and "format" in fields) and (weights := _find_pytorch_weights(path)):
        raise CheckpointError(
            f"{path}: holds PyTorch weights ({weights}); `vllama convert` makes a model directory of them"
        )
    if fields is None:
        raise CheckpointError(f"{path}: not a model directory (no config.json in it); `vllama convert` makes one")
    _check_format(path / "config.json", fields, "model")
    return fields


def _read_store_config(path: StorePath) -> dict[str, Any]:
    """The same of a directory on an object store, which is complete when its manifest, written last, is there."""
    try:
        content = (path / "config.json").read_bytes()
        fields = parse_object(content, str(path / "config.json"), CheckpointError)
        complete = "base" in fields or (path / "manifest.json").exists()
    except FileNotFoundError as error:
        why = error.strerror if "bucket" in str(error.strerror) else "no config.json in it"
        raise CheckpointError(f"{path}: not a model directory ({why}); `vllama convert` makes one") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not complete:
        raise CheckpointError(f"{path}: incomplete (no manifest.json, which is written last); copy or convert it again")
    _check_format(path / "config.json", fields, "model")
    return fields


def _run(path: Path, fields: dict[str, Any], base: str | Path | None) -> RunDirectory:
    """A run with its base: what is given, else what config.json names, else the miniature or what is beside the run."""
    where, config = path / "config.json", fields.get("run")
    recorded = from_dict(fields["base"], BaseReference, f"{where}: base")
    lora = config.get("lora") if isinstance(config, dict) else None
    named = find_model(base or recorded.path)
    beside = path.absolute().parent / named.name  # where it is when both were moved
    if not base and not named.is_dir():
        # The miniature may have been unpacked into a cache folder that is gone, or shipped in another place.
        named = shipped_model() if is_shipped_digest(recorded.digest) else beside if beside.is_dir() else named
    if not named.is_dir():
        raise CheckpointError(
            f"{path}: its base model {named} is not there, nor beside the run; name it with --base, or put it there"
        )
    return RunDirectory(
        path, named, recorded.digest, from_dict(lora, LoraConfig, f"{where}: run.lora", range(LARGEST_INTEGER + 1))
    )


def _open_model_directory(path: Path) -> ModelDirectory:
    for name in ("manifest.json", "params", "tokenizer"):
        if not (path / name).exists():
            raise CheckpointError(f"{path}: not a model directory (no {name} in it); `vllama convert` makes one")
    manifest = read_object(path / "manifest.json")
    _check_format(path / "manifest.json", manifest, "leaves")
    check_manifest(manifest["leaves"], str(path / "manifest.json"))
    if not _are_sources(manifest.get("sources")):
        raise CheckpointError(f"{path / 'manifest.json'}: its sources are not lists of files; convert the model again")
    return ModelDirectory(path, _model_config(path, read_config(path)), manifest)


def _find_pytorch_weights(directory: Path) -> str:
    """The name of a file of PyTorch weights in a directory, or one below it; "" where there is none."""
    places = [directory, *(entry for entry in sorted(directory.iterdir()) if entry.is_dir())]
    files = (entry for place in places for entry in sorted(place.iterdir()) if entry.suffix in PYTORCH_SUFFIXES)
    return next((str(file.relative_to(directory)) for file in files), "")


def _are_sources(sources: Any) -> bool:
    """Whether a manifest's sources are files, each with a name, by kind."""
    lists = list(sources.values()) if isinstance(sources, dict) else [None]
    return all(
        isinstance(files, list) and all(isinstance(file, dict) and isinstance(file.get("name"), str) for file in files)
        for files in lists
    )


def _model_config(path: Path, fields: dict[str, Any]) -> VideoLlamaConfig:
    return from_dict(fields["model"], VideoLlamaConfig, f"{path / 'config.json'}: model")


def _last_weights(run: Path) -> Path:
    """The weights in a run's last checkpoint. Raises CheckpointError when they are damaged."""
    steps = list_checkpoint_steps(run)
    if not steps:
        raise CheckpointError(f"{run}: a run that has no checkpoint yet; let it reach one")
    name = f"step_{steps[-1]}"
    try:
        check_checkpoint(run / name, "weights")
    except CheckpointError as error:
        advice = f"rename {name} to damaged_{name} to use step_{steps[-2]}" if len(steps) > 1 else "copy it again"
        raise CheckpointError(f"{run}: its last checkpoint, {name}, is damaged ({error}); {advice}") from error
    return run / name / "weights"


def open_trained_weights(weights: Path, lora: LoraConfig) -> TrainedWeights:
    """Read which arrays are in the weights of a checkpoint. Raises CheckpointError when Orbax cannot."""
    import orbax.checkpoint as ocp
    from flax.traverse_util import flatten_dict

    try:
        local = weights
        if is_store_path(weights):
            if not (weights / OCDBT_MANIFEST).exists():
                arrays = open_arrays(weights)
                shapes = {path: array.shape for path, array in arrays.items()}
                return TrainedWeights(weights, shapes, {path: array.dtype.name for path, array in arrays.items()}, lora)
            local = copy_store_arrays(weights)
        handler = ocp.PyTreeCheckpointHandler(enable_pinned_host_transfer=False)  # told, it starts no device to ask
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


def _check_format(path: Path, fields: dict[str, Any], needed: str) -> None:
    made = fields.get("format")
    told = format_value(made)
    if isinstance(made, int) and made > MODEL_FORMAT:
        raise CheckpointError(
            f"{path}: its format is {told}, newer than this version's {MODEL_FORMAT}; update vllama-jax"
        )
    if made != MODEL_FORMAT or not isinstance(fields.get(needed), dict):
        raise CheckpointError(
            f"{path}: not of a model directory (format {told}, {MODEL_FORMAT} is known); convert again"
        )
