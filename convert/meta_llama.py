"""Open a LLaMA in Meta's layout, consolidated.NN.pth and params.json, as tensors with Hugging Face's names.

Every matrix is sharded over the files, as in Megatron. Meta's rotary embedding rotates pairs of adjacent elements,
Hugging Face's pairs that are half a head apart; rows of query and key matrices are reordered accordingly.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllama_jax.convert.language_config import MAX_EPSILON, MAX_ROPE_THETA
from vllama_jax.convert.weight_files import Source, WeightFile, open_weight_file, read_config_file
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.io.json_fields import drop_null, get_bool, get_integer, get_number

SHARD = re.compile(r"consolidated\.(\d+)\.pth")
MAX_LENGTH = 2048  # of LLaMA-1; the files do not contain that of LLaMA-2, which is 4096

# Meta's name → Hugging Face's, and the axis along which a tensor is sharded (None: replicated in every shard).
META_NAMES: dict[str, tuple[str, int | None]] = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
    "rope.freqs": ("model.layers.0.self_attn.rotary_emb.inv_freq", None),  # compared by redundant.py
}
EMBEDDING = "tok_embeddings.weight"


def is_meta(directory: Path) -> bool:
    """Whether a directory is a LLaMA in Meta's layout."""
    return (directory / "params.json").is_file() and bool(_shard_paths(directory))


def open_meta(directory: Path) -> Source:
    """Open the weights.

    Args:
        directory: A directory with params.json and all consolidated.NN.pth.

    Returns:
        The complete tensors, under Hugging Face's names.

    Raises:
        CheckpointError: A shard is missing, cannot be read, or has other tensors than the first one.
        ConfigError: params.json has missing or invalid values.
    """
    paths = _shard_paths(directory)
    numbers = [int(found[1]) for path in paths if (found := SHARD.fullmatch(path.name))]
    if numbers != list(range(len(numbers))):
        missing = next(number for number in range(len(numbers)) if number not in numbers)
        raise CheckpointError(f"{directory}: consolidated.{missing:02}.pth is missing; download all of them")
    params = read_params(directory)
    shards = MetaShards(str(directory), [open_weight_file(path) for path in paths], params)
    return Source(str(directory), paths, [shards])


def llama_fields(params: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Return the fields of LlamaConfig. The width of the MLP is inferred from the weights: params.json has none."""
    return {
        "width": params["dim"],
        "depth": params["n_layers"],
        "num_heads": params["n_heads"],
        "num_kv_heads": params["n_kv_heads"],
        "head_dim": params["dim"] // params["n_heads"],
        "mlp_dim": source.shape("model.layers.0.mlp.gate_proj.weight", 2)[0],
        "norm_eps": params["norm_eps"],
        "max_length": MAX_LENGTH,
        "rope_theta": params["rope_theta"],
        "rope_scaling": None,
        "tie_embeddings": False,
        "family": "llama",
        "qkv_bias": False,
        "qk_norm": False,
    }


def read_params(directory: Path) -> dict[str, Any]:
    """Read params.json, with defaults. Raises ConfigError for missing, invalid or unsupported values."""
    where, params = directory / "params.json", read_config_file(directory / "params.json")
    params = drop_null(params, "n_kv_heads")
    for name in ("dim", "n_layers", "n_heads"):
        get_integer(params, name, str(where), ConfigError)
    params["n_kv_heads"] = get_integer(params, "n_kv_heads", str(where), ConfigError, params["n_heads"])
    if params["dim"] % (2 * params["n_heads"]):
        raise ConfigError(f"{where}: a width of {params['dim']} cannot have {params['n_heads']} heads")
    params["norm_eps"] = get_number(params, "norm_eps", str(where), ConfigError, MAX_EPSILON)
    params["rope_theta"] = get_number(params, "rope_theta", str(where), ConfigError, MAX_ROPE_THETA, 10000.0)
    if get_bool(params, "use_scaled_rope", str(where), ConfigError):
        raise ConfigError(
            f"{where}: the parameters of its rotary scaling are missing; use the model in Hugging Face's layout"
        )
    return params


def tokenizer_directory(directory: Path) -> Path:
    """Return the directory of the tokenizer: this one, or its parent, as in Meta's downloads of several sizes."""
    return directory if (directory / "tokenizer.model").exists() else directory.absolute().parent


class MetaShards:
    """A WeightFile of all shards. A tensor is joined when it is read."""

    def __init__(self, label: str, files: Sequence[WeightFile], params: Mapping[str, Any]):
        self._label, self._files = label, files
        self._heads = {"q_proj": params["n_heads"], "k_proj": params["n_kv_heads"]}
        self._homes: dict[str, tuple[str, int | None]] = {}
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        for shard, file in enumerate(files):
            if file.tensors != files[0].tensors:
                raise CheckpointError(
                    f"{label}: consolidated.{shard:02}.pth has other tensors than consolidated.00.pth"
                )
        for theirs, (shape, dtype) in files[0].tensors.items():
            name, axis = _to_hugging_face_name(theirs, shape, params["dim"])
            self._homes[name] = theirs, axis
            self.tensors[name] = _joined_shape(shape, axis, len(files)), dtype

    def read(self, name: str) -> np.ndarray:
        """Read a tensor from all shards. Raises CheckpointError if replicated tensors differ."""
        theirs, axis = self._homes[name]
        if axis is None or len(self._files) == 1:
            tensor = self._files[0].read(theirs)
            self._check_replicas(theirs, tensor)
        else:
            tensor = np.concatenate([file.read(theirs) for file in self._files], axis)
        heads = next((heads for projection, heads in self._heads.items() if f".{projection}." in name), None)
        return tensor if heads is None else reorder_rotary_rows(tensor, heads)

    def _check_replicas(self, theirs: str, first: np.ndarray) -> None:
        """Raise CheckpointError if a replicated tensor is not the same in all shards."""
        for shard, file in enumerate(self._files[1:], 1):
            if not np.array_equal(file.read(theirs).view(np.uint8), first.view(np.uint8)):
                shards = f"consolidated.{shard:02}.pth and consolidated.00.pth"
                raise CheckpointError(f"{self._label}: {shards} differ in {theirs}; download them again")


def reorder_rotary_rows(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows [h·k, d] of each head from Meta's to Hugging Face's order: even rows first, then odd rows."""
    return matrix.reshape(heads, -1, 2, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def _shard_paths(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("consolidated.*.pth") if SHARD.fullmatch(path.name))


def _to_hugging_face_name(theirs: str, shape: tuple[int, ...], width: int) -> tuple[str, int | None]:
    """Return a tensor's name and sharded axis. Unknown ones keep their name, and are later reported as unexpected."""
    if theirs == EMBEDDING:  # sharded along the width in LLaMA 1 and 2, along the vocabulary in 3
        return "model.embed_tokens.weight", 0 if shape[1:] == (width,) else 1
    layer = re.fullmatch(r"layers\.(\d+)\.(.*)", theirs)
    if layer and layer[2] in META_NAMES:
        name, axis = META_NAMES[layer[2]]
        return f"model.layers.{layer[1]}.{name}", axis
    return META_NAMES.get(theirs, (theirs, None))


def _joined_shape(shape: tuple[int, ...], axis: int | None, num_shards: int) -> tuple[int, ...]:
    if axis is None or axis >= len(shape):
        return shape
    return (*shape[:axis], shape[axis] * num_shards, *shape[axis + 1 :])
