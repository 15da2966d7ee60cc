"""The Q-Former's layers from `transformers`."""

import torch
from torch import nn
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerLayer

from vllama_jax.config import QFormerConfig

NAMES = {"attention.attention.": "attention.self."}  # substrings of transformers' names → of the original's


def configuration(cfg: QFormerConfig, memory_width: int) -> Blip2QFormerConfig:
    """Return transformers' config of a Q-Former whose queries attend to features of width `memory_width`."""
    return Blip2QFormerConfig(
        hidden_size=cfg.width,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.num_heads,
        intermediate_size=cfg.mlp_dim,
        layer_norm_eps=1e-12,
        cross_attention_frequency=cfg.cross_attention_every,
        encoder_hidden_size=memory_width,
        attn_implementation="eager",
    )


class Queries(nn.Module):
    """The normalized query tokens, repeated for each example: the input of the first layer."""

    def __init__(self, cfg: QFormerConfig):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, cfg.num_queries, cfg.width))
        self.norm = nn.LayerNorm(cfg.width, eps=1e-12)

    def forward(self, memory: torch.Tensor) -> torch.Tensor:
        return self.norm(self.query_tokens).repeat(len(memory), 1, 1)


class Layer(Blip2QFormerLayer):
    """One layer, which processes queries only, no text."""

    def __init__(self, cfg: QFormerConfig, memory_width: int, number: int):
        super().__init__(configuration(cfg, memory_width), number)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return super().forward(x, encoder_hidden_states=memory, query_length=x.shape[1])
