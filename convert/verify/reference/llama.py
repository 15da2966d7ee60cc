"""The language model's layers from `transformers`, configured by the config.json of the source."""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from vllama_jax import config as ours
from vllama_jax.convert.language_config import to_hugging_face_config
from vllama_jax.convert.weight_files import read_config_file


def configuration(directory: Path, cfg: ours.LlamaConfig) -> PretrainedConfig:
    """Return transformers' config of a language model.

    Args:
        directory: The directory of the language model.
        cfg: Our config, used for Meta's layout, which has no config.json.
    """
    path = directory / "config.json"
    fields = read_config_file(path) if path.exists() else to_hugging_face_config(cfg)
    config = AutoConfig.for_model(**{"model_type": "llama", **fields})
    config._attn_implementation = "sdpa"
    return config


class Layer(nn.Module):
    """One layer, with causal attention over complete prompts."""

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
    """The final norm and the head."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        model = _one_layer(config)
        self.norm, self.head = model.model.norm, model.lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))


def _one_layer(config: PretrainedConfig) -> nn.Module:
    """Create a model of this architecture with one layer, on the current device."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
