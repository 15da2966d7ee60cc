"""Export a model or run directory to the files that the original's PyTorch code reads.

`plan_export` lists the files and their tensors. `export` reads the weights and writes the files, one tensor at a time.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vllama_jax.checkpoints.arrays import check_params
from vllama_jax.checkpoints.directory import ModelDirectory
from vllama_jax.checkpoints.reader import RowReader, make_row_reader, stored_dtype
from vllama_jax.checkpoints.restore import check_leaves
from vllama_jax.config import VideoLlamaConfig, to_dict
from vllama_jax.convert import imagebind
from vllama_jax.convert.components import FILE_SPECS
from vllama_jax.convert.language_config import to_hugging_face_config
from vllama_jax.convert.match_weights import abstract_shapes
from vllama_jax.convert.rules import Rule, transpose_contiguous
from vllama_jax.convert.write_tensors import BytesProgress, Tensor, write_safetensors, write_torch
from vllama_jax.io.atomic import new_directory, replace_json, write_file, write_json
from vllama_jax.io.json_files import read_object
from vllama_jax.io.paths import require_local_output

ExportFormat = Literal["pth", "safetensors"]
ExportPlan = Mapping[str, Sequence[Tensor]]  # the tensors of each file, by its path in the output directory

EXPORT_SHARD_BYTES = 5e9  # of a safetensors file; transformers' default when LLaMA was published
NUM_POSITION_IDS = 512  # BERT's max_position_embeddings


def plan_export(
    model: ModelDirectory, format: ExportFormat = "pth", shard_bytes: float = EXPORT_SHARD_BYTES
) -> ExportPlan:
    """List the files of an export and the tensors of each.

    Args:
        model: The model directory, or a run opened as one.
        format: "pth" for the original's separate files, with the language model as safetensors. "safetensors" for one
            file, in which every tensor has its name in the original's complete model.
        shard_bytes: The largest size of a file of the language model, unless a single tensor is larger.

    Returns:
        The tensors of each file, by its path in the output directory.

    Raises:
        CheckpointError: Weights are missing or truncated.
    """
    by_type = _tensors_by_file_type(model)
    if format == "safetensors":
        named = {tensor.name: tensor for tensor in _with_full_names(by_type)}  # branches share buffers
        return {"model.safetensors": list(named.values())}
    shards = _shards(by_type.pop("llama"), shard_bytes)
    return {_file_name(file_type): tensors for file_type, tensors in by_type.items()} | shards


def _file_name(file_type: str) -> str:
    return f"{FILE_SPECS[file_type].file_name or file_type}.pth"


def export(
    model: ModelDirectory, files: ExportPlan, out: str | Path, progress: BytesProgress = lambda done: None
) -> None:
    """Write the files of an export, and a config.json for `vllama convert --config`.

    They are written under a temporary name; `out` exists only when it is complete. Converting it again gives the same
    model.

    Args:
        model: The model directory, or a run opened as one.
        files: What `plan_export(model)` returned.
        out: The directory to create.
        progress: Called with the number of bytes written since the last call.

    Raises:
        CheckpointError: `out` exists or cannot be written, or the model cannot be read.

    Example:
        >>> from pathlib import Path
        >>> from vllama_jax.checkpoints.directory import open_model
        >>> from vllama_jax.convert.export import export, plan_export
        >>> model = open_model("miniature")
        >>> export(model, plan_export(model, "safetensors"), "exported")
        >>> sorted(file.name for file in Path("exported").iterdir())
        ['config.json', 'model.safetensors']
    """
    bare = {_file_name(file_type) for file_type, spec in FILE_SPECS.items() if spec.bare}
    with new_directory(require_local_output(out)) as directory:
        shards = {Path(name).name: tensors for name, tensors in files.items() if name.startswith("llama/")}
        if shards:
            _write_llama(directory / "llama", model, shards)
        for name, tensors in files.items():
            if name.endswith(".pth"):
                write_torch(directory / name, tensors, name not in bare, progress)
            else:
                write_safetensors(directory / name, tensors, progress)
        write_json(directory / "config.json", to_dict(model.config))


def export_bytes(files: ExportPlan) -> int:
    """Return the number of bytes of tensors that `export` writes, for a progress bar."""
    return sum(tensor.nbytes for tensors in files.values() for tensor in tensors)


def _tensors_by_file_type(model: ModelDirectory) -> dict[str, list[Tensor]]:
    """Return the tensors of every file type that the model has weights for."""
    config, rules = model.config, _rules_by_file_type(model)
    targets = {rule.target for table in rules.values() for rule in table}
    shapes = abstract_shapes(config)
    check_leaves(model, {target: shapes[target] for target in targets})
    from_runs = {path for trained in model.trained for path in trained.leaves}
    check_params(model.path / "params", model.manifest["leaves"], sorted(targets - from_runs))
    read = make_row_reader(model)
    by_type = {}
    for file_type, table in rules.items():
        weights = [tensor for rule in table for tensor in _source_tensors(rule, shapes[rule.target], model, read)]
        by_type[file_type] = [*weights, *_buffers(file_type, config)]
    return by_type


def _rules_by_file_type(model: ModelDirectory) -> dict[str, list[Rule]]:
    config = model.config
    rules = {file_type: spec.rules(config) for file_type, spec in FILE_SPECS.items() if spec.applies(config)}
    return {
        file_type: table
        for file_type, table in rules.items()
        if not FILE_SPECS[file_type].may_be_untrained or _signature_weight(file_type, table) in model.shapes
    }


def _signature_weight(file_type: str, rules: Sequence[Rule]) -> str:
    """Return the path of the weight that the signature tensor of a file type is made from."""
    return next(rule.target for rule in rules if FILE_SPECS[file_type].signature in itertools.chain(*rule.names()))


def _source_tensors(rule: Rule, shape: tuple[int, ...], model: ModelDirectory, read: RowReader) -> Iterator[Tensor]:
    """Yield the PyTorch tensors of a weight: one or more for each layer."""

    def read_tensor(row: int | None, number: int) -> np.ndarray:
        return _to_c_order(rule.transform.to_torch(read(rule.target, row))[number])

    shapes, dtype = rule.source_shapes(shape), stored_dtype(model, rule.target)
    for row, names in enumerate(rule.names()):
        for number, name in enumerate(names):
            layer_row = None if rule.layers is None else row
            yield Tensor(name, shapes[number], dtype, functools.partial(read_tensor, layer_row, number))


def _to_c_order(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2 and array.T.flags.c_contiguous:
        return transpose_contiguous(array.T)
    return np.ascontiguousarray(array)


def _buffers(file_type: str, config: VideoLlamaConfig) -> list[Tensor]:
    """Return the constant buffers that the original saves in a file of this type."""
    from vllama_jax.nn.llama import rope_frequencies

    qformers = {"blip2": ("",), "vl": ("", "video_"), "al": ("", "video_", "audio_")}.get(file_type, ())
    buffers = {f"{name}Qformer.bert.embeddings.position_ids": np.arange(NUM_POSITION_IDS)[None] for name in qformers}
    if file_type in ("vl", "al"):
        name = "llama_model.model.layers.{}.self_attn.rotary_emb.inv_freq"
        buffers |= {name.format(layer): rope_frequencies(config.llama) for layer in range(config.llama.depth)}
    if file_type == "al":
        buffers |= {
            f"audio_encoder.{name}": value for name, value in imagebind.buffers(config.require_imagebind()).items()
        }
    if file_type == "imagebind":
        buffers[imagebind.AUDIO_SCALE] = imagebind.buffers(config.require_imagebind())[imagebind.AUDIO_SCALE]
    return [
        Tensor(name, value.shape, value.dtype, functools.partial(np.asarray, value)) for name, value in buffers.items()
    ]


def _with_full_names(by_type: Mapping[str, Sequence[Tensor]]) -> Iterator[Tensor]:
    for file_type, tensors in by_type.items():
        for tensor in tensors:
            yield dataclasses.replace(tensor, name=FILE_SPECS[file_type].prefix + tensor.name)


def _shards(tensors: Sequence[Tensor], shard_bytes: float) -> dict[str, list[Tensor]]:
    """Divide the language model's tensors, in order, over files with transformers' names."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(previous.nbytes for previous in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return {"llama/model.safetensors": shards[0]}
    return {f"llama/model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}


def _write_llama(directory: Path, model: ModelDirectory, shards: ExportPlan) -> None:
    """Write the files of a Hugging Face directory other than the weights: tokenizer, config.json and index."""
    directory.mkdir()
    for file in (model.path / "tokenizer").iterdir():
        write_file(directory / file.name, file.read_bytes())
    dtype = stored_dtype(model, "llama/embedding").name
    fields = to_hugging_face_config(model.config.llama) | _special_ids(model) | {"torch_dtype": dtype}
    # The directory of a tokenizer.json has a config.json too, for the special token ids.
    replace_json(directory / "config.json", fields)
    if len(shards) > 1:
        weight_map = {tensor.name: shard for shard, tensors in shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": export_bytes(shards)}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def _special_ids(model: ModelDirectory) -> dict[str, Any]:
    """Return the special token ids of the config.json that is stored with the tokenizer, else the tokenizer's."""
    eos_ids = model.tokenizer.eos_ids
    eos = eos_ids[0] if len(eos_ids) == 1 else [*eos_ids]
    ids = {"bos_token_id": model.tokenizer.bos_id, "eos_token_id": eos}
    path = model.path / "tokenizer" / "config.json"
    stored = read_object(path) if path.exists() else {}
    return ids | {name: stored[name] for name in (*ids, "pad_token_id") if name in stored}
