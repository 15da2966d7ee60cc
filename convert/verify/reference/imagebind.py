"""ImageBind's audio and vision towers (arXiv 2305.05665), in PyTorch."""

import torch
from torch import nn

from vllama_jax.config import ImageBindAudioConfig
from vllama_jax.towers import ImageBindVisionConfig


class Preprocessor(nn.Module):
    """Patch embeddings after a class token, with position embeddings."""

    def __init__(self, stem: nn.Module, num_patches: int, width: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.rgbt_stem = stem
        self.pos_embedding_helper = nn.Module()
        self.pos_embedding_helper.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.rgbt_stem(x)
        tokens = torch.cat([self.cls_token.repeat(len(patches), 1, 1), patches], dim=1)
        return tokens + self.pos_embedding_helper.pos_embed


class AudioStem(nn.Module):
    """Overlapping patches of the log-mel spectrogram, row by row, and a layer norm with PyTorch's default epsilon."""

    def __init__(self, cfg: ImageBindAudioConfig):
        super().__init__()
        self.proj = nn.Conv2d(1, cfg.width, cfg.patch_size, stride=cfg.patch_stride, bias=False)
        self.norm_layer = nn.LayerNorm(cfg.width, eps=1e-5)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        return self.norm_layer(flatten_grid(self.proj(mel[:, None])))


class VisionStem(nn.Module):
    """Patches of an image that is repeated to two frames, which one patch spans. Without bias and norm."""

    def __init__(self, cfg: ImageBindVisionConfig):
        super().__init__()
        window = (2, cfg.patch_size, cfg.patch_size)
        self.proj = nn.Sequential(RepeatFrame(), nn.Conv3d(3, cfg.width, window, stride=window, bias=False))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return flatten_grid(self.proj(images))


class RepeatFrame(nn.Module):
    """Repeat images [b, c, h, w] to videos of two frames, [b, c, 2, h, w]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([images, images], dim=2)


def flatten_grid(grid: torch.Tensor) -> torch.Tensor:
    """Flatten a grid [b, d, …] to [b, n, d], row by row."""
    return grid.flatten(2).transpose(1, 2)


class Block(nn.Module):
    """A pre-norm transformer block. Those of the audio tower have an extra learned key and value."""

    def __init__(self, cfg: ImageBindAudioConfig | ImageBindVisionConfig, extra_key_value: bool):
        super().__init__()
        self.norm_1 = nn.LayerNorm(cfg.width, eps=1e-6)
        self.attn = nn.MultiheadAttention(cfg.width, cfg.num_heads, add_bias_kv=extra_key_value, batch_first=True)
        self.norm_2 = nn.LayerNorm(cfg.width, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(cfg.width, cfg.mlp_dim)
        self.mlp.fc2 = nn.Linear(cfg.mlp_dim, cfg.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.mlp.fc1(self.norm_2(x))
        return x + self.mlp.fc2(nn.functional.gelu(y))


def head(width: int, embed_dim: int) -> nn.Sequential:
    """Create the head: norm, class token, projection to the joint embedding space."""
    return nn.Sequential(nn.LayerNorm(width, eps=1e-6), ClassToken(), nn.Linear(width, embed_dim, bias=False))


class ClassToken(nn.Module):
    """Select the class token of [b, n, d]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0]


class Normalize(nn.Module):
    """Scale embeddings to unit norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x, dim=-1, eps=1e-12)


class Scale(nn.Module):
    """Multiply by the exponential of the stored log scale, at most 100."""

    def __init__(self, log_logit_scale: float):
        super().__init__()
        self.log_logit_scale = nn.Buffer(torch.tensor(log_logit_scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.log_logit_scale.exp().clamp(max=100.0) * x
