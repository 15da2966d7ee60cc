"""LLaMA's layers, by `transformers`, which reads its config.json itself."""

from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from vllama_jax import config as ours
from vllama_jax.convert.llama import config_fields


def configuration(directory: Path, told: ours.LlamaConfig) -> LlamaConfig:
    """Of a Hugging Face directory; what was told of Meta's files, which have no config.json."""
    path = directory / "config.json"
    config = LlamaConfig.from_json_file(path) if path.exists() else LlamaConfig(**config_fields(told))
    config._attn_implementation = "sdpa"
    return config


class Layer(LlamaDecoderLayer):
    """One layer over whole prompts, each token seeing those before it."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config, layer_idx=0)
        with torch.device("cpu"):  # computed, not loaded
            self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None]
        return super().forward(x, position_ids=positions, position_embeddings=self.rotary(x, positions))


class Logits(nn.Module):
    """The last norm and the head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))
