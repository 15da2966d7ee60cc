"""EVA-CLIP's vision transformer (arXiv 2211.07636), as BLIP-2 uses it, in PyTorch."""

import torch
from torch import nn

from vllama_jax.towers import VitConfig


class Embeddings(nn.Module):
    """Patch embeddings after a class token, with position embeddings."""

    def __init__(self, cfg: VitConfig):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.num_patches + 1, cfg.width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, cfg.width, cfg.patch_size, stride=cfg.patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images [b, 3, h, w] as [b, 1 + patches, width]."""
        patches = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.repeat(len(patches), 1, 1), patches], dim=1) + self.pos_embed


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, cfg: VitConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, eps=1e-6)
        self.attn = Attention(cfg)
        self.norm2 = nn.LayerNorm(cfg.width, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(cfg.width, cfg.mlp_dim)
        self.mlp.fc2 = nn.Linear(cfg.mlp_dim, cfg.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values, and biases for queries and values only."""

    def __init__(self, cfg: VitConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(cfg.width))
        self.v_bias = nn.Parameter(torch.zeros(cfg.width))
        self.proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        qkv = (query + self.q_bias, key, value + self.v_bias)
        heads = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in qkv)
        attended = nn.functional.scaled_dot_product_attention(*heads)
        return self.proj(attended.transpose(1, 2).flatten(2))
