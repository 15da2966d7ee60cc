"""Families of language models: how the config.json and the weights of each architecture are converted.

The network (nn/llama.py) does not depend on the family, only on fields of LlamaConfig, some of which an entry fixes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vllama_jax.config import LlamaConfig
from vllama_jax.convert import llama
from vllama_jax.convert.rules import Rule
from vllama_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of `transformers`.

    Attributes:
        architecture: The model class, `architectures` in config.json of an export.
        template: The default prompt template of a converted model.
        fixed: Fields of LlamaConfig that are the same for all models of the family.
        defaults: Fields of config.json and their values if absent, as in the architecture's config class.
        required: Fields of config.json and their only supported values. They are written on export.
        rules: (language model config) → the rule table.
        unused_tensors: (language model config) → regular expressions on names of tensors that are not used, each with
            the reason.
    """

    architecture: str
    template: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rules: Callable[[LlamaConfig], list[Rule]] = llama.rules
    unused_tensors: Callable[[LlamaConfig], dict[str, str]] = llama.unused_tensors


# By `model_type` of config.json. Defaults are those of transformers 5.24, which does not write all of them.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        template="vicuna",
        required={"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        template="mistral",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        required={"sliding_window": None},
    ),
    "qwen2": Family(  # and Qwen2.5
        architecture="Qwen2ForCausalLM",
        template="chatml",
        fixed={"qkv_bias": True},
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
        required={"use_sliding_window": False},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        template="chatml",
        fixed={"qk_norm": True},
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
        required={"attention_bias": False, "use_sliding_window": False},
    ),
}


def find_family(name: str) -> Family:
    """Return the family with this name, `model_type` of config.json.

    Raises:
        ConfigError: There is no such family.
    """
    if name not in FAMILIES:
        raise ConfigError(f"unknown family of language models {name!r}: supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]
