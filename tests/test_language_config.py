"""config.json of language models: what is read, what is refused, and fields that older versions did not write."""

import dataclasses
import json

import pytest
import transformers
from language_models import FAMILIES

from vllama_jax.config import from_dict, tiny, to_dict
from vllama_jax.convert.language_config import read_llama_config
from vllama_jax.errors import ConfigError


def test_llama_configs_are_written_as_in_earlier_versions():
    fields = dataclasses.asdict(tiny())
    for name in ("family", "qkv_bias", "qk_norm"):
        del fields["llama"][name]
    del fields["extra_branches"]
    assert json.dumps(to_dict(tiny())) == json.dumps(fields)
    assert from_dict(fields) == tiny()
    qwen = dataclasses.replace(tiny(), llama=dataclasses.replace(tiny().llama, family="qwen3", qk_norm=True))
    assert from_dict(to_dict(qwen)) == qwen


UNSUPPORTED = [
    ("mistral", {"sliding_window": 512}, "sliding_window is 512, which is not supported; only null is"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True, which is not supported; only false is"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True, which is not supported; only false is"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is "),
    ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn' is not supported"),
    ("qwen2_moe", {}, "model_type 'qwen2_moe' is not supported; --llama takes one of llama, mistral, qwen2, qwen3"),
    ("qwen3", {"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
]


@pytest.mark.parametrize(("name", "changes", "message"), UNSUPPORTED)
def test_unsupported_fields_are_named(tmp_path, name, changes, message):
    fields = {"model_type": name, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    fields |= {"intermediate_size": 112, "num_key_value_heads": 2, "sliding_window": None, **changes}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError) as raised:
        read_llama_config(tmp_path)
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(raised.value)


def test_a_sliding_window_of_the_context_length_is_accepted(tmp_path):
    fields = {"model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    fields |= {"intermediate_size": 112, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"sliding_window": 4096}))
    assert read_llama_config(tmp_path)["max_length"] == 4096


def test_missing_fields_have_transformers_defaults(tmp_path):
    """Compare each family's defaults with its config class."""
    for name in FAMILIES:
        fields = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 32, "intermediate_size": 112}
        theirs = transformers.AutoConfig.for_model(name, **fields)
        window = {} if name != "mistral" else {"sliding_window": None}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **fields, **window}))
        ours = read_llama_config(tmp_path)
        assert ours["num_kv_heads"] == theirs.num_key_value_heads
        assert ours["max_length"] == theirs.max_position_embeddings
        assert ours["norm_eps"] == theirs.rms_norm_eps
        assert ours["rope_theta"] == theirs.rope_parameters["rope_theta"]
        assert ours["head_dim"] == (getattr(theirs, "head_dim", None) or 2)
        assert ours["tie_embeddings"] == theirs.tie_word_embeddings
