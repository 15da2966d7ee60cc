"""Hugging Face's LlamaForCausalLM → `llama`, and its config.json → LlamaConfig."""

import os
import re
from pathlib import Path
from typing import Any

from vllama_jax.config import LlamaConfig, RopeScaling
from vllama_jax.errors import CheckpointError, ConfigError

from .rules import SAME, TRANSPOSE, Rule, from_heads, linear, to_heads
from .sources import read_config_file


def rules(cfg: LlamaConfig) -> list[Rule]:
    layers, layer = range(cfg.depth), "model.layers.{i}"
    attention, mlp = "llama/blocks/attention", "llama/blocks/mlp"
    query_heads, key_heads = (cfg.num_heads, cfg.head_dim), (cfg.num_kv_heads, cfg.head_dim)
    head = [] if cfg.tie_embeddings else [Rule("llama/head/kernel", ("lm_head.weight",), TRANSPOSE)]
    return [
        Rule("llama/embedding", ("model.embed_tokens.weight",), SAME),
        Rule("llama/blocks/attention_norm/scale", (f"{layer}.input_layernorm.weight",), SAME, layers),
        *to_heads(f"{attention}/query", f"{layer}.self_attn.q_proj", query_heads, layers, bias=False),
        *to_heads(f"{attention}/key", f"{layer}.self_attn.k_proj", key_heads, layers, bias=False),
        *to_heads(f"{attention}/value", f"{layer}.self_attn.v_proj", key_heads, layers, bias=False),
        *from_heads(f"{attention}/out", f"{layer}.self_attn.o_proj", cfg.num_heads, layers, bias=False),
        Rule("llama/blocks/mlp_norm/scale", (f"{layer}.post_attention_layernorm.weight",), SAME, layers),
        *linear(f"{mlp}/gate", f"{layer}.mlp.gate_proj", layers, bias=False),
        *linear(f"{mlp}/up", f"{layer}.mlp.up_proj", layers, bias=False),
        *linear(f"{mlp}/down", f"{layer}.mlp.down_proj", layers, bias=False),
        Rule("llama/norm/scale", ("model.norm.weight",), SAME),
        *head,
    ]


def extras(cfg: LlamaConfig) -> dict[str, str]:
    """Tensors that the files have and the model does not use (regular expressions), and why."""
    tied = {r"lm_head\.weight": "the head is tied to the embeddings"} if cfg.tie_embeddings else {}
    return {INV_FREQ: "rotary frequencies are computed, and were compared", **tied}


INV_FREQ = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
STORED_INV_FREQ = rf"(llama_model\.)?{INV_FREQ}"  # as LLaMA's own files and Video-LLaMA's checkpoints name it


_WEIGHT_FILE = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(bin|safetensors)(\.index\.json)?")


def is_hugging_face(directory: Path) -> bool:
    """Whether a directory is a Hugging Face LLaMA with weights in it."""
    if not (directory / "config.json").is_file() or not any(map(_WEIGHT_FILE.fullmatch, os.listdir(directory))):
        return False
    return read_config_file(directory / "config.json").get("model_type") == "llama"


def is_own_file(name: str) -> bool:
    """Whether a file in such a directory is of the language model, and no other piece."""
    return bool(_WEIGHT_FILE.fullmatch(name)) or name.endswith((".json", ".model"))


def read_config(directory: Path, option: str = "--llama") -> dict[str, Any]:
    """The fields of LlamaConfig that a directory's config.json gives. option: by which it was given.

    Raises CheckpointError when it is missing, and ConfigError when it describes what LLaMA is not.
    """
    path = directory / "config.json"
    if not directory.is_dir():
        what = "not a directory" if directory.exists() else "no such directory"
        raise CheckpointError(f"{directory}: {what}; {option} takes a Hugging Face LLaMA directory")
    if not path.exists():
        raise CheckpointError(f"{directory}: no config.json; {option} takes a Hugging Face LLaMA directory")
    fields = read_config_file(path)
    if fields.get("model_type", "llama") != "llama":
        raise ConfigError(f"{path}: a model of type {fields['model_type']!r}, where {option} takes a LLaMA")
    for name in ("attention_bias", "mlp_bias"):
        if fields.get(name):
            raise ConfigError(f"{path}: {name} is set; LLaMAs with such biases are not supported")
    if fields.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{path}: activation {fields['hidden_act']!r}, where LLaMA has silu")
    return _fields(fields, str(path))


def config_fields(cfg: LlamaConfig) -> dict[str, Any]:
    """What a config.json says of this language model: `read_config` backward."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        **{theirs: getattr(cfg, ours) for ours, theirs in _DIMENSIONS.items()},
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_length,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": _scaling_fields(cfg.rope_scaling),
        "tie_word_embeddings": cfg.tie_embeddings,
    }


def _scaling_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"type": "linear", "factor": scaling.factor}  # what every version reads; the older take no field more
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_length,
    }


_DIMENSIONS = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}


def _fields(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Types are checked when the config is built of them."""
    for name in _DIMENSIONS.values():
        if type(fields.get(name)) is not int or fields[name] < 1:
            raise ConfigError(f"{where}: {name} must be a whole number above 0, not {fields.get(name)!r}")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: rope_scaling must be an object, not {rope!r}")
    return {
        **{ours: fields[theirs] for ours, theirs in _DIMENSIONS.items()},
        "num_kv_heads": fields.get("num_key_value_heads") or fields["num_attention_heads"],
        "head_dim": fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"],
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "max_length": fields.get("max_position_embeddings", 2048),
        "rope_theta": fields.get("rope_theta") or rope.get("rope_theta") or 10000.0,
        "rope_scaling": _rope_scaling(rope, where),
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }


def _rope_scaling(rope: dict[str, Any], where: str) -> dict[str, Any] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    theirs = {"factor": "factor"}
    if kind == "llama3":
        theirs |= {name: name for name in ("low_freq_factor", "high_freq_factor")}
        theirs["original_max_length"] = "original_max_position_embeddings"
    elif kind != "linear":
        raise ConfigError(f"{where}: rotary scaling {kind!r} is not supported; known are linear and llama3")
    if missing := [name for name in theirs.values() if name not in rope]:
        raise ConfigError(f"{where}: rotary scaling {kind!r} has no {', '.join(missing)}")
    return {"kind": kind} | {ours: rope[name] for ours, name in theirs.items()}
