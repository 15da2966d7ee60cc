"""Hugging Face's LlamaForCausalLM → `llama`, and its config.json → LlamaConfig."""

from pathlib import Path
from typing import Any

import numpy as np

from vllama_jax.config import LlamaConfig, parse_json
from vllama_jax.errors import CheckpointError, ConfigError

from .rules import SAME, TRANSPOSE, Rule, from_heads, linear, to_heads


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


def read_config(directory: Path) -> dict[str, Any]:
    """The fields of LlamaConfig that a directory's config.json gives.

    Raises CheckpointError when it is missing, and ConfigError when it describes what LLaMA is not.
    """
    path = directory / "config.json"
    if not path.exists():
        raise CheckpointError(f"{directory}: no config.json; --llama takes a Hugging Face LLaMA directory")
    fields = parse_json(path.read_text(), str(path))
    if fields.get("model_type", "llama") != "llama":
        raise ConfigError(f"{path}: a model of type {fields['model_type']!r}, where a LLaMA is needed")
    for name in ("attention_bias", "mlp_bias"):
        if fields.get(name):
            raise ConfigError(f"{path}: {name} is set; LLaMAs with such biases are not supported")
    if fields.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{path}: activation {fields['hidden_act']!r}, where LLaMA has silu")
    try:
        return _fields(fields, str(path))
    except KeyError as error:
        raise ConfigError(f"{path}: no field {error}") from error


def _fields(fields: dict[str, Any], where: str) -> dict[str, Any]:
    heads = fields["num_attention_heads"]
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    return {
        "width": fields["hidden_size"],
        "depth": fields["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
        "mlp_dim": fields["intermediate_size"],
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
    if kind == "linear":
        return {"kind": "linear", "factor": rope["factor"]}
    if kind == "llama3":
        return {
            "kind": "llama3",
            "factor": rope["factor"],
            "low_freq_factor": rope["low_freq_factor"],
            "high_freq_factor": rope["high_freq_factor"],
            "original_max_length": rope["original_max_position_embeddings"],
        }
    raise ConfigError(f"{where}: rotary scaling {kind!r} is not supported; known are linear and llama3")


def same_frequencies(stored: np.ndarray, computed: np.ndarray) -> bool:
    """Whether an `inv_freq` buffer is what we compute (half-precision files keep it in half precision)."""
    return stored.shape == computed.shape and np.allclose(stored.astype(np.float32), computed, rtol=2e-3, atol=1e-7)
