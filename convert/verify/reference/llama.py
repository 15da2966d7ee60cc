"""The language model's layers, by `transformers`, whose config class for the architecture reads config.json itself."""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from vllama_jax import config as ours
from vllama_jax.convert.language_config import to_hugging_face_config
from vllama_jax.convert.weight_files import read_config_file


def configuration(directory: Path, told: ours.LlamaConfig) -> PretrainedConfig:
    """Of a Hugging Face directory; what was told of Meta's files, which have no config.json."""
    path = directory / "config.json"
    fields = read_config_file(path) if path.exists() else to_hugging_face_config(told)
    config = AutoConfig.for_model(**{"model_type": "llama", **fields})
    config._attn_implementation = "sdpa"
    return config


class Layer(nn.Module):
    """One layer over whole prompts, each token seeing those before it."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        model = _one_layer(config).model
        self.layer = model.layers[0]
        with torch.device("cpu"):  # computed, not loaded
            self.rotary = type(model.rotary_emb)(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None]
        return self.layer(x, position_ids=positions, position_embeddings=self.rotary(x, positions))


class Logits(nn.Module):
    """The last norm and the head."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        whole = _one_layer(config)
        self.norm, self.head = whole.model.norm, whole.lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))


def _one_layer(config: PretrainedConfig) -> nn.Module:
    """The model of this architecture with one layer, made on the current device."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
