"""Rules of EVA-CLIP's file (eva_vit_g.pth) for the component `vit`."""

import math
from typing import Any

import numpy as np

from vllama_jax.config import EVA_G
from vllama_jax.convert.rules import (
    IDENTITY,
    SQUEEZE_TO_MATRIX,
    SQUEEZE_TO_VECTOR,
    Rule,
    Transform,
    from_heads,
    linear,
    norm,
    patch_kernel,
    to_heads_kernel,
)
from vllama_jax.convert.weight_files import Source, count_layers
from vllama_jax.towers import TowerConfig


def _join_qv_bias(heads: int) -> Transform:
    """Join the biases of queries and values to one of [3, h, k]. Keys have none and get zeros."""

    def to_jax(query: np.ndarray, value: np.ndarray) -> np.ndarray:
        return np.stack([query, np.zeros_like(query), value]).reshape(3, heads, -1)

    return Transform(to_jax, lambda x: (x[0].reshape(-1), x[2].reshape(-1)))


def rules(cfg: TowerConfig) -> list[Rule]:
    """Return the rule table of `vit`."""
    layers, heads = range(cfg.depth), (cfg.num_heads, cfg.width // cfg.num_heads)
    return [
        Rule("vit/class_token", ("cls_token",), SQUEEZE_TO_VECTOR),
        Rule("vit/positions", ("pos_embed",), SQUEEZE_TO_MATRIX),
        Rule("vit/patch_embed/kernel", ("patch_embed.proj.weight",), patch_kernel(cfg.patch_size, cfg.patch_size)),
        Rule("vit/patch_embed/bias", ("patch_embed.proj.bias",), IDENTITY),
        *norm("vit/blocks/norm1", "blocks.{i}.norm1", layers),
        Rule("vit/blocks/attention/qkv/kernel", ("blocks.{i}.attn.qkv.weight",), to_heads_kernel(3, *heads), layers),
        Rule(
            "vit/blocks/attention/qkv/bias",
            ("blocks.{i}.attn.q_bias", "blocks.{i}.attn.v_bias"),
            _join_qv_bias(cfg.num_heads),
            layers,
        ),
        *from_heads("vit/blocks/attention/out", "blocks.{i}.attn.proj", cfg.num_heads, layers),
        *norm("vit/blocks/norm2", "blocks.{i}.norm2", layers),
        *linear("vit/blocks/mlp/up", "blocks.{i}.mlp.fc1", layers),
        *linear("vit/blocks/mlp/down", "blocks.{i}.mlp.fc2", layers),
    ]


def unused_tensors(cfg: TowerConfig) -> dict[str, str]:
    """Return regular expressions on names of tensors that are not used, each with the reason."""
    used = "|".join(map(str, range(cfg.depth)))
    return {
        rf"blocks\.(?!(?:{used})\.)\d+\..*": f"only EVA's first {cfg.depth} blocks are used",
        r"(norm|fc_norm|head)\..*": "EVA's own final norm and head are not used",
    }


def infer(source: Source) -> dict[str, Any]:
    """Infer the fields of VitConfig that tensor shapes determine: all but the head count."""
    width, _, _, patch_size = source.shape("patch_embed.proj.weight", 4)
    num_blocks = count_layers(source, r"blocks\.(\d+)\.")
    return {
        "image_size": patch_size * math.isqrt(source.shape("pos_embed", 3)[1] - 1),
        "patch_size": patch_size,
        "width": width,
        "depth": EVA_G.depth if width == EVA_G.width else num_blocks - 1,  # BLIP-2 drops EVA's last block
        "mlp_dim": source.shape("blocks.0.mlp.fc1.weight", 2)[0],
    }
