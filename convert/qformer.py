"""A Q-Former in BERT's names, with the queries beside it → `image_qformer`, `video_qformer` or `audio_qformer`."""

from collections.abc import Sequence

from vllama_jax.config import QFormerConfig
from vllama_jax.convert.rules import TABLE, Rule, from_heads, linear, norm, to_heads


def rules(target: str, source: str, queries: str, cfg: QFormerConfig) -> list[Rule]:
    """target: our name. source: the module's name in the file. queries: the name of the query tokens."""
    every = cfg.cross_attention_every
    table = [
        Rule(f"{target}/queries", (queries,), TABLE),
        *norm(f"{target}/norm", f"{source}.bert.embeddings.LayerNorm"),
        *_layer(f"{target}/cross_layers", source, cfg, range(0, cfg.depth, every), cross=True),
    ]
    if every == 2:
        table += _layer(f"{target}/plain_layers", source, cfg, range(1, cfg.depth, every), cross=False)
    return table


def _layer(target: str, source: str, cfg: QFormerConfig, layers: Sequence[int], *, cross: bool) -> list[Rule]:
    layer = f"{source}.bert.encoder.layer.{{i}}"
    return [
        *_attention(f"{target}/attention", f"{layer}.attention", cfg, layers),
        *(_attention(f"{target}/cross_attention", f"{layer}.crossattention", cfg, layers) if cross else []),
        *linear(f"{target}/mlp/up", f"{layer}.intermediate_query.dense", layers),
        *linear(f"{target}/mlp/down", f"{layer}.output_query.dense", layers),
        *norm(f"{target}/mlp_norm", f"{layer}.output_query.LayerNorm", layers),
    ]


def _attention(target: str, source: str, cfg: QFormerConfig, layers: Sequence[int]) -> list[Rule]:
    heads = (cfg.num_heads, cfg.width // cfg.num_heads)
    return [
        *to_heads(f"{target}/query", f"{source}.self.query", heads, layers),
        *to_heads(f"{target}/key", f"{source}.self.key", heads, layers),
        *to_heads(f"{target}/value", f"{source}.self.value", heads, layers),
        *from_heads(f"{target}/out", f"{source}.output.dense", cfg.num_heads, layers),
        *norm(f"{target}/norm", f"{source}.output.LayerNorm", layers),
    ]
