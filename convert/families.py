"""Families of language models as data: what the config.json of each architecture says and which weights it has.

The network (nn/llama.py) knows no family: it reads the fields of LlamaConfig that an entry fixes.
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
    """One architecture of `transformers`.

    Attributes:
        architecture: The class that config.json names.
        template: The prompt template of a converted model, unless another is given.
        fixed: Fields of LlamaConfig that the architecture fixes.
        defaults: Fields of config.json where it does not have them, as the architecture's config class has them.
        required: Fields of config.json with the only value that is supported; an export has them too.
        rules: Which tensors of its files are which weights.
        extras: Tensors of its files that are not used (regular expressions), and why.
    """

    architecture: str
    template: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rules: Callable[[LlamaConfig], list[Rule]] = llama.rules
    unused_tensors: Callable[[LlamaConfig], dict[str, str]] = llama.unused_tensors


# By config.json's model_type. Defaults are those of transformers 5.24, whose config.json leaves some of them out.
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
    "qwen2": Family(  # Qwen2.5 too
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
    """Return the family of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in FAMILIES:
        raise ConfigError(f"no family {name!r} of language models: supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]
