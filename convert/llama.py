"""Rules of Hugging Face's LlamaForCausalLM, and of families with the same tensor names, for `llama`."""

from vllama_jax.config import LlamaConfig
from vllama_jax.convert.rules import IDENTITY, TRANSPOSE, Rule, from_heads, linear, to_heads


def rules(cfg: LlamaConfig) -> list[Rule]:
    """Return the rule table of `llama`."""
    layers, layer = range(cfg.depth), "model.layers.{i}"
    attention, mlp = "llama/blocks/attention", "llama/blocks/mlp"
    query_heads, key_heads = (cfg.num_heads, cfg.head_dim), (cfg.num_kv_heads, cfg.head_dim)
    qk_norms = [
        Rule(f"{attention}/{name}_norm/scale", (f"{layer}.self_attn.{letter}_norm.weight",), IDENTITY, layers)
        for name, letter in (("query", "q"), ("key", "k"))
    ]
    head = [] if cfg.tie_embeddings else [Rule("llama/head/kernel", ("lm_head.weight",), TRANSPOSE)]
    return [
        Rule("llama/embedding", ("model.embed_tokens.weight",), IDENTITY),
        Rule("llama/blocks/attention_norm/scale", (f"{layer}.input_layernorm.weight",), IDENTITY, layers),
        *to_heads(f"{attention}/query", f"{layer}.self_attn.q_proj", query_heads, layers, bias=cfg.qkv_bias),
        *to_heads(f"{attention}/key", f"{layer}.self_attn.k_proj", key_heads, layers, bias=cfg.qkv_bias),
        *to_heads(f"{attention}/value", f"{layer}.self_attn.v_proj", key_heads, layers, bias=cfg.qkv_bias),
        *(qk_norms if cfg.qk_norm else []),
        *from_heads(f"{attention}/out", f"{layer}.self_attn.o_proj", cfg.num_heads, layers, bias=False),
        Rule("llama/blocks/mlp_norm/scale", (f"{layer}.post_attention_layernorm.weight",), IDENTITY, layers),
        *linear(f"{mlp}/gate", f"{layer}.mlp.gate_proj", layers, bias=False),
        *linear(f"{mlp}/up", f"{layer}.mlp.up_proj", layers, bias=False),
        *linear(f"{mlp}/down", f"{layer}.mlp.down_proj", layers, bias=False),
        Rule("llama/norm/scale", ("model.norm.weight",), IDENTITY),
        *head,
    ]


def unused_tensors(cfg: LlamaConfig) -> dict[str, str]:
    """Return regular expressions on names of tensors that are not used, each with the reason."""
    tied = "the head is tied to the embeddings, which are equal"  # compared in language.py
    return {r"lm_head\.weight": tied} if cfg.tie_embeddings else {}
