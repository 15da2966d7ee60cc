"""Model directories: written layer by layer, restored by Orbax straight into their shards.

config.json   what the model is          params/         Orbax layout, one zarr array a leaf, uncompressed
tokenizer/    the tokenizer's files       manifest.json   sources, and each leaf's shape, dtype and xxh3_128

A run directory (train/runs.py) is read as the model that was trained: its base's weights, but for those that it
trained.
"""

import dataclasses
import functools
import importlib.metadata
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllama_jax.compilation import keep_compiled_programs
from vllama_jax.config import LARGEST, NO_LORA, LoraConfig, VideoLlamaConfig, from_dict
from vllama_jax.errors import CheckpointError, ConfigError, one_line
from vllama_jax.io.atomic import replace_json, write_json
from vllama_jax.io.json_fields import shown
from vllama_jax.io.json_files import read_object
from vllama_jax.params import check_manifest, check_params
from vllama_jax.run_directory import check_checkpoint, run_steps
from vllama_jax.shipped import find_model

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from vllama_jax.nn.layers import Keys
    from vllama_jax.nn.video_llama import VideoLlama
    from vllama_jax.text.tokenizer import Tokenizer

FORMAT = 1
BRANCH_PARTS = (
    *("video_qformer", "frame_positions", "llama_proj"),
    *("audio_qformer", "audio_positions", "audio_llama_proj"),
)
PYTORCH_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")
IN_FLIGHT_GB = 4  # of weights that are read at once, at least one whole weight in float32
logger = logging.getLogger(__name__)


def write_config(directory: Path, config: VideoLlamaConfig, **more: Any) -> None:
    """config.json; a run has `more` to say in it."""
    versions = {name: importlib.metadata.version(name) for name in ("vllama-jax", "jax", "flax", "orbax-checkpoint")}
    fields = {"format": FORMAT, "versions": versions, "model": dataclasses.asdict(config), **more}
    replace_json(directory / "config.json", fields)


def write_manifest(directory: Path, sources: dict[str, Any], leaves: dict[str, dict], **more: Any) -> None:
    """manifest.json; that of quantised weights has `more` to say."""
    write_json(directory / "manifest.json", {"format": FORMAT, "sources": sources, "leaves": leaves, **more})


@dataclasses.dataclass(frozen=True)
class Trained:
    """Weights that a run trained. path: of its checkpoint. leaves: their shapes. dtypes: the names of theirs."""

    path: Path
    leaves: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    lora: LoraConfig

    @property
    def save_id(self) -> bytes:
        """Bytes that differ from save to save, and not from copy to copy. Raises CheckpointError."""
        try:
            return (self.path / "manifest.ocdbt").read_bytes()
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """The base model of a run, as its config.json has it: the directory, and the digest of all weights."""

    path: str
    digest: str


@dataclasses.dataclass(frozen=True)
class Run:
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
    trained: tuple[Trained, ...] = ()

    @functools.cached_property
    def tokenizer(self):
        from vllama_jax.text.tokenizer import load_tokenizer

        return load_tokenizer(self.path / "tokenizer")

    @property
    def opened(self) -> Path:
        """The directory that this was opened as: the last run's, or the model's own."""
        return self.trained[-1].path.parents[1] if self.trained else self.path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight, by path."""
        shapes = {path: tuple(leaf["shape"]) for path, leaf in self.manifest["leaves"].items()}
        return shapes | {path: shape for trained in self.trained for path, shape in trained.leaves.items()}

    @property
    def lora(self) -> LoraConfig:
        """The low-rank updates that a run trained; they are no part of `config`, because `load` merges them."""
        return next((trained.lora for trained in self.trained if trained.lora.rank), NO_LORA)

    @property
    def quantized(self) -> str | None:
        """How its large kernels are quantised, as quantize.py does it; None where they are not."""
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
    runs, model = find_runs(find_model(path), base)
    directory = _open_model_directory(model)
    for run in reversed(runs):
        if directory.digest != run.base_digest:
            raise CheckpointError(
                f"{run.base}: not the base model that {run.path} was trained on; name that one with --base"
            )
        trained = open_trained(_last_weights(run.path), run.lora)
        directory = dataclasses.replace(directory, trained=(*directory.trained, trained))
    return directory


def find_runs(path: Path, base: str | Path | None = None) -> tuple[list[Run], Path]:
    """Find the runs that `path` consists of, the last one first, and the model directory that the first started from.

    No weight is looked at. Raises as `open_model` does for what is neither a model directory nor a run.
    """
    runs: list[Run] = []
    while "base" in (fields := read_config(path)):
        if any(os.path.samefile(path, run.path) for run in runs):
            raise CheckpointError(f"{path / 'config.json'}: the run is its own base model; name the right one: --base")
        runs.append(_run(path, fields, base))
        path, base = runs[-1].base, None
    return runs, path


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json of a model or run directory. Raises CheckpointError when there is none of a known format."""
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: a file, not a model directory; `vllama convert` makes one of PyTorch weights"
            if path.exists()
            else f"{path}: no such model directory; `vllama convert` makes one"
        )
    fields = read_object(path / "config.json") if (path / "config.json").exists() else None
    if not (fields and "format" in fields) and (weights := _pytorch_weights(path)):
        raise CheckpointError(
            f"{path}: holds PyTorch weights ({weights}); `vllama convert` makes a model directory of them"
        )
    if fields is None:
        raise CheckpointError(f"{path}: not a model directory (no config.json in it); `vllama convert` makes one")
    _check_format(path / "config.json", fields, "model")
    return fields


def _run(path: Path, fields: dict[str, Any], base: str | Path | None) -> Run:
    """A run with its base: the one that is given, else where config.json has it, else beside the run."""
    where, config = path / "config.json", fields.get("run")
    recorded = from_dict(fields["base"], Base, f"{where}: base")
    lora = config.get("lora") if isinstance(config, dict) else None
    named = Path(base or recorded.path)
    beside = path.absolute().parent / named.name  # where it is when both were moved
    if not base and not os.path.isdir(named) and os.path.isdir(beside):
        named = beside
    if not os.path.isdir(named):
        raise CheckpointError(
            f"{path}: its base model {named} is not there, nor beside the run; name it with --base, or put it there"
        )
    return Run(path, named, recorded.digest, from_dict(lora, LoraConfig, f"{where}: run.lora", range(LARGEST + 1)))


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


def _pytorch_weights(directory: Path) -> str:
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
    steps = run_steps(run)
    if not steps:
        raise CheckpointError(f"{run}: a run that has no checkpoint yet; let it reach one")
    name = f"step_{steps[-1]}"
    try:
        check_checkpoint(run / name, "weights")
    except CheckpointError as error:
        advice = f"rename {name} to damaged_{name} to use step_{steps[-2]}" if len(steps) > 1 else "copy it again"
        raise CheckpointError(f"{run}: its last checkpoint, {name}, is damaged ({error}); {advice}") from error
    return run / name / "weights"


def open_trained(weights: Path, lora: LoraConfig) -> Trained:
    """Read which arrays are in the weights of a checkpoint. Raises CheckpointError when Orbax cannot."""
    import orbax.checkpoint as ocp
    from flax.traverse_util import flatten_dict

    try:
        handler = ocp.PyTreeCheckpointHandler(enable_pinned_host_transfer=False)  # told, it starts no device to ask
        leaves = flatten_dict(handler.metadata(weights.absolute()).tree, sep="/")
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        return Trained(weights, shapes, {path: leaf.dtype.name for path, leaf in leaves.items()}, lora)
    except Exception as error:  # Orbax raises errors of every type
        raise CheckpointError(f"{weights}: cannot be read ({one_line(error)})") from error


def _check_format(path: Path, fields: dict[str, Any], needed: str) -> None:
    made = fields.get("format")
    told = shown(made)
    if isinstance(made, int) and made > FORMAT:
        raise CheckpointError(f"{path}: its format is {told}, newer than this version's {FORMAT}; update vllama-jax")
    if made != FORMAT or not isinstance(fields.get(needed), dict):
        raise CheckpointError(f"{path}: not of a model directory (format {told}, {FORMAT} is known); convert again")


Restoring = Callable[[ModelDirectory, dict[str, Any]], "dict[str, jax.Array]"]


def restore(directory: ModelDirectory, abstract: "nnx.State", weights: Restoring | None = None) -> "nnx.State":
    """The weights of `directory` in the shapes, dtypes and shardings of `abstract`; each host reads its part.

    `abstract` may hold some of the model's weights only. weights: reads them by path; `restore_weights` unless given.

    Raises CheckpointError when a leaf is missing, has another shape, or cannot be read.
    """
    import jax
    from flax import nnx

    wanted = {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(abstract)}
    restored = (weights or restore_weights)(directory, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[path] for path in wanted])


def restore_weights(directory: ModelDirectory, wanted: dict[str, Any]) -> "dict[str, jax.Array]":
    """The same for weights by path: `wanted` says in which shape, dtype and sharding."""
    check_leaves(directory, {path: leaf.shape for path, leaf in wanted.items()})
    restored: dict[str, Any] = {}
    for trained in reversed(directory.trained):
        here = {path: leaf for path, leaf in wanted.items() if path in trained.leaves and path not in restored}
        restored |= restore_arrays(trained.path, here)
    rest = {path: leaf for path, leaf in wanted.items() if path not in restored}
    check_params(directory.path / "params", directory.manifest["leaves"], rest)
    return restored | restore_arrays(directory.path / "params", rest)


def restore_arrays(path: Path, wanted: dict[str, Any]) -> "dict[str, jax.Array]":
    """Arrays by path from a directory in Orbax's layout, some or all of what it holds.

    Raises CheckpointError when they cannot be read.
    """
    import jax
    import orbax.checkpoint as ocp

    if not wanted:
        return {}
    tree = nest({path: placed(leaf) for path, leaf in wanted.items()})
    restore_args = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape), tree
    )
    arguments = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True)
    here = all(leaf.sharding.is_fully_addressable for leaf in jax.tree.leaves(tree))
    alone = {jax.process_index()} if here and jax.process_count() > 1 else None  # no other process is waited for
    options = ocp.options.MultiprocessingOptions(active_processes=alone)
    handler = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=options, restore_concurrent_gb=gb_in_flight(leaf.shape for leaf in wanted.values())
    )
    checkpointer = ocp.Checkpointer(handler, multiprocessing_options=options)
    try:
        restored = checkpointer.restore(path.absolute(), args=arguments)
        return {name: _leaf(restored, name) for name in wanted}
    except Exception as error:  # Orbax raises errors of every type
        raise CheckpointError(f"{path}: its weights cannot be read ({one_line(error)})") from error


def gb_in_flight(shapes: Iterable[Sequence[int]]) -> int:
    """GB (10⁹ bytes) of weights of these shapes that a host reads at once at most."""
    return max(IN_FLIGHT_GB, max(math.prod(shape) for shape in shapes) * 4 // 10**9 + 1)


def placed(leaf: Any) -> Any:
    """An abstract leaf with a sharding: its own, or the first device's."""
    import jax

    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check_leaves(directory: ModelDirectory, wanted: dict[str, Sequence[int]]) -> None:
    """Raises CheckpointError that lists parts which the directory lacks, or leaves of another shape."""
    shapes = directory.shapes
    missing = [path for path in wanted if path not in shapes]
    if any(f"{path.removesuffix('/kernel')}/values" in shapes for path in missing):
        raise only_answers(directory.path, directory.quantized)
    if missing:
        raise _lacking(directory, missing)
    if wrong := [path for path, shape in wanted.items() if shapes[path] != tuple(shape)]:
        raise CheckpointError(f"{directory.path}: config.json and weights disagree on the shape of {', '.join(wrong)}")


def _lacking(directory: ModelDirectory, missing: list[str]) -> CheckpointError:
    """What is wrong where weights are missing: a part that was never trained, or one that is there in part."""
    parts = sorted({path.split("/")[0] for path in missing})
    if not any(path.split("/")[0] in parts for path in directory.shapes):
        branches = set(parts) <= set(BRANCH_PARTS)
        files = "checkpoints that hold them (--vl, --al), or train them" if branches else "files that hold them"
        told = f"the model has no {', '.join(parts)} ({len(missing)} weights)"
        return CheckpointError(f"{directory.path}: {told}; convert again with the {files}")
    if any(re.fullmatch(r".*/blocks/\d+/.*", path) for path in directory.shapes):
        return CheckpointError(
            f"{directory.path}: its layers are stored one by one, and not stacked; save what "
            "`vllama_jax.load(..., stacked=True)` gives"
        )
    more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
    return CheckpointError(f"{directory.path}: lacks {missing[0]}{more} of a part that it has; convert it again")


def only_answers(path: str | Path, scheme: str | None) -> CheckpointError:
    """What is raised where a quantised model is asked for more than answers."""
    return CheckpointError(
        f"{path}: its weights are {scheme}, good for answers and nothing else; take the model that it was made from"
    )


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """A tree of dicts from values by path."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = value
    return tree


def _leaf(tree: dict[str, Any], path: str) -> Any:
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model: what `vllama_jax.load` returns. `network` is the Flax module (nn/video_llama.py)."""

    config: VideoLlamaConfig
    tokenizer: "Tokenizer"
    network: "VideoLlama"


def load(
    path: str | Path | ModelDirectory,
    dtype: str | None = None,
    mesh: "jax.sharding.Mesh | None" = None,
    base: str | Path | None = None,
    quantize: str | None = None,
    audio_scale: float | None = None,
    *,
    stacked: bool = False,
) -> Model:
    """Loads a model directory, or what a run trained; named, or as `open_model` opened it. "miniature" is shipped.

    dtype: of the weights in memory and so of the computation; float32 on a CPU and bfloat16 elsewhere unless given.
    mesh: from `sharding.make_mesh`; weights are split over its tensor axis, and a warning is logged for each dimension
    that it does not divide. Without one, all is on the first device.
    base: a run's base model, where that has moved.
    quantize: "int8" or "int4" for the large kernels of LLaMA and the ViT, layer by layer as they are read; a quantised
    model directory (quantize.py) needs no telling.
    stacked: leave the language model's layers stacked on axis 0, as they are on disk: for training and saving; answers
    take longer.
    audio_scale: the norm of a sound's vector, the model's own unless given: 20 as published, while training saw
    vectors of norm 1 (docs/miniature.md measures what that does).
    Compiled programs are kept on disk from then on, as `compilation.keep_compiled_programs` has it.
    Raises CheckpointError for what is not a whole model directory, ConfigError for one whose config is not valid.
    """
    from flax import nnx

    from vllama_jax import quantize as quantizing
    from vllama_jax.nn.lora import merge_lora
    from vllama_jax.text.tokenizer import check_vocabulary

    directory = without_missing_branch(path if isinstance(path, ModelDirectory) else open_model(path, base))
    keep_compiled_programs()
    if audio_scale is not None:
        directory = _with_audio_scale(directory, audio_scale)
    check_vocabulary(directory.tokenizer, directory.config.llama.vocab_size)
    network, weights = quantizing.abstract_network(directory, dtype, quantize)
    graph, abstract = nnx.split(network)
    if mesh is not None:
        from vllama_jax import sharding

        for line in sharding.undivided_axes(abstract, mesh, fsdp=False):
            logger.warning(line)
        abstract = sharding.shard_abstract(abstract, mesh, fsdp=False)
    network = nnx.merge(graph, restore(directory, abstract, weights))
    merge_lora(network.llama)
    if not stacked:
        network.llama.unstack()
    return Model(directory.config, directory.tokenizer, network)


def without_missing_branch(directory: ModelDirectory) -> ModelDirectory:
    """A model whose audio branch was never trained is a picture-only model, for now."""
    parts = {path.split("/")[0] for path in directory.shapes}
    if not directory.config.has_audio or "audio_qformer" in parts:
        return directory
    logger.warning(f"{directory.path}: no trained audio branch in it (--al, or training), so sound is not heard")
    config = dataclasses.replace(directory.config, audio_qformer=None, imagebind=None)
    return dataclasses.replace(directory, config=config)


def default_dtype() -> str:
    """What weights are cast to when nothing is said: XLA multiplies bfloat16 slowly on a CPU."""
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _with_audio_scale(directory: ModelDirectory, scale: float) -> ModelDirectory:
    """The same model with sound vectors of another norm. Raises ConfigError where that means nothing."""
    if not directory.config.has_audio:
        raise ConfigError(f"{directory.path}: a picture-only model hears nothing, so there is no audio scale")
    audio = directory.config.imagebind.audio
    if not 0 < scale <= audio.max_logit_scale:
        raise ConfigError(f"the audio scale must be above 0 and at most {audio.max_logit_scale:g}, not {scale:g}")
    audio = dataclasses.replace(audio, log_logit_scale=math.log(scale))
    imagebind = dataclasses.replace(directory.config.imagebind, audio=audio)
    return dataclasses.replace(directory, config=dataclasses.replace(directory.config, imagebind=imagebind))


def abstract_network(config: VideoLlamaConfig, dtype: str | None = None, lora: LoraConfig = NO_LORA) -> "VideoLlama":
    """The network with shapes in place of weights, in the dtype that `load` would use."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.dtype(dtype or default_dtype())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _traced_network(config, lora))


@functools.cache
def _traced_network(config: VideoLlamaConfig, lora: LoraConfig) -> "VideoLlama":
    """The network with shapes. A command asks for it several times, and tracing it takes most of a second."""
    import jax
    from flax import nnx

    from vllama_jax.nn.layers import Keys

    return nnx.eval_shape(lambda: new_network(config, lora, Keys(jax.random.key(0))))


def new_network(config: VideoLlamaConfig, lora: LoraConfig, rngs: "nnx.Rngs | Keys") -> "VideoLlama":
    """The network as training starts it, with its low-rank updates."""
    from vllama_jax.nn.lora import add_lora
    from vllama_jax.nn.video_llama import VideoLlama

    network = VideoLlama(config, rngs=rngs)
    add_lora(network.llama, lora, rngs=rngs)
    return network
