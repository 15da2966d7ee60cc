"""Rules of a Q-Former with BERT's tensor names, for `image_qformer`, `video_qformer` or `audio_qformer`."""

import re
from collections.abc import Sequence
from typing import Any

from vllama_jax.config import QFormerConfig
from vllama_jax.convert.rules import SQUEEZE_TO_MATRIX, Rule, from_heads, linear, norm, to_heads
from vllama_jax.convert.weight_files import Source, count_layers


def rules(target: str, source: str, queries: str, cfg: QFormerConfig) -> list[Rule]:
    """Return the rule table of a Q-Former.

    Args:
        target: The path of the component.
        source: The module's name in the file, for example "video_Qformer".
        queries: The name of the query tokens in the file.
        cfg: The Q-Former's config.
    """
    every = cfg.cross_attention_every
    table = [
        Rule(f"{target}/queries", (queries,), SQUEEZE_TO_MATRIX),
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


def infer(source: Source, module: str, queries: str) -> dict[str, Any]:
    """Infer the fields of QFormerConfig that tensor shapes determine: all but the head count.

    Args:
        source: The file.
        module: The module's name in the file.
        queries: The name of the query tokens in the file.
    """
    layer = f"{module}.bert.encoder.layer"
    depth = count_layers(source, rf"{re.escape(layer)}\.(\d+)\.")
    every_second = depth > 1 and f"{layer}.1.crossattention.self.query.weight" not in source
    _, num_queries, width = source.shape(queries, 3)
    return {
        "width": width,
        "depth": depth,
        "mlp_dim": source.shape(f"{layer}.0.intermediate_query.dense.weight", 2)[0],
        "num_queries": num_queries,
        "cross_attention_every": 2 if every_second else 1,
    }
