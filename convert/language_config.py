"""Convert between LlamaConfig and the config.json of a language model in Hugging Face's layout."""

import os
import re
from pathlib import Path
from typing import Any

from vllama_jax.config import MAX_VALUES, LlamaConfig, RopeScaling
from vllama_jax.convert.families import FAMILIES, Family, find_family
from vllama_jax.convert.weight_files import read_config_file
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.io.json_fields import REQUIRED, drop_null, format_value, get_bool, get_integer, get_number

_WEIGHT_FILE = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(bin|safetensors)(\.index\.json)?")


def is_hugging_face(directory: Path) -> bool:
    """Whether a directory is a language model of a supported family in Hugging Face's layout, with its weights."""
    if not (directory / "config.json").is_file() or not any(map(_WEIGHT_FILE.fullmatch, os.listdir(directory))):
        return False
    return read_config_file(directory / "config.json").get("model_type") in tuple(FAMILIES)


def is_hugging_face_file(name: str) -> bool:
    """Whether a file in such a directory belongs to the language model, by its name."""
    return bool(_WEIGHT_FILE.fullmatch(name)) or name.endswith((".json", ".model"))


def read_llama_config(directory: Path, option: str = "--llama") -> dict[str, Any]:
    """Read a language model's config.json.

    Args:
        directory: The directory of the language model.
        option: The command line option that `directory` was given with, for messages.

    Returns:
        The fields of LlamaConfig, except `vocab_size`, which is inferred from the embeddings.

    Raises:
        CheckpointError: There is no config.json, or it cannot be read.
        ConfigError: It describes an architecture that is not supported, or has invalid values.
    """
    path = directory / "config.json"
    if not directory.is_dir():
        problem = "not a directory" if directory.exists() else "no such directory"
        raise CheckpointError(f"{directory}: {problem}; {option} takes a Hugging Face LLaMA directory")
    if not path.exists():
        raise CheckpointError(
            f"{directory}: no config.json; {option} takes a Hugging Face LLaMA directory, or Meta's with params.json "
            f"and consolidated.00.pth; {_describe_contents(directory)}"
        )
    fields = read_config_file(path)
    if "format" in fields and "model" in fields:
        raise CheckpointError(f"{directory}: a model directory, not a Hugging Face LLaMA directory; give it as --base")
    name = fields.get("model_type", "llama")
    if name not in tuple(FAMILIES):
        known = ", ".join(FAMILIES)
        raise ConfigError(f"{path}: model_type {format_value(name)} is not supported; {option} takes one of {known}")
    _check_supported(fields, FAMILIES[name], str(path))
    return _to_llama_fields(fields, name, str(path))


def _check_supported(fields: dict[str, Any], family: Family, where: str) -> None:
    """Raise ConfigError for a feature that the network does not have. The message names the field."""
    for name, value in family.required.items():
        given = family.defaults.get(name, value) if name not in fields else fields[name]
        if value is False:
            given = get_bool(fields, name, where, ConfigError)
        if given != value and not (name == "sliding_window" and _covers_context(fields, family, where)):
            advice = f"only {'null' if value is None else str(value).lower()} is"
            raise ConfigError(f"{where}: {name} is {format_value(given)}, which is not supported; {advice}")
    layer_types = fields.get("layer_types") or []
    if not isinstance(layer_types, list) or any(layer_type != "full_attention" for layer_type in layer_types):
        raise ConfigError(f"{where}: layer_types is {format_value(layer_types)}; only full_attention is supported")
    if fields.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{where}: activation {format_value(fields['hidden_act'])} is not supported; only silu is")
    if fields.get("quantization_config"):
        raise ConfigError(f"{where}: quantized weights (quantization_config) are not supported; use the original model")


def _covers_context(fields: dict[str, Any], family: Family, where: str) -> bool:
    """Whether a sliding window is at least as long as the context, so that it has no effect."""
    fields = {**family.defaults, **fields}
    window = get_integer(fields, "sliding_window", where, ConfigError)
    return window >= get_integer(fields, "max_position_embeddings", where, ConfigError)


def _describe_contents(directory: Path) -> str:
    """Describe the contents of a directory that is not a language model, or suggest one of its subdirectories."""
    entries = sorted(directory.iterdir())
    for entry in entries:
        if entry.is_dir() and ((entry / "config.json").exists() or (entry / "params.json").exists()):
            return f"did you mean {entry}?"
    names = [entry.name for entry in entries[:3]]
    return f"it contains {', '.join(names)}{', …' if len(entries) > 3 else ''}" if names else "it is empty"


def to_hugging_face_config(cfg: LlamaConfig) -> dict[str, Any]:
    """Return the config.json of a language model, the inverse of `read_llama_config`."""
    family = find_family(cfg.family)
    return {
        "architectures": [family.architecture],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab_size,
        **{theirs: getattr(cfg, ours) for ours, theirs in _DIMENSIONS.items()},
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        **family.required,
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_length,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": _scaling_fields(cfg.rope_scaling),
        "tie_word_embeddings": cfg.tie_embeddings,
    }


def _scaling_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        # All versions of transformers read these two fields; older ones reject others.
        return {"type": "linear", "factor": scaling.factor}
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_length,
    }


_DIMENSIONS = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}


MAX_EPSILON, MAX_ROPE_THETA, MAX_ROPE_FACTOR = MAX_VALUES["norm_eps"], MAX_VALUES["rope_theta"], MAX_VALUES["factor"]


def _to_llama_fields(fields: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    family = FAMILIES[name]
    fields = drop_null(fields, "num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters")
    fields = {**family.defaults, **fields}

    def integer(name: str, default: Any = REQUIRED) -> int:
        return get_integer(fields, name, where, ConfigError, default)

    dimensions = {ours: integer(theirs) for ours, theirs in _DIMENSIONS.items()}
    rope = _rope(fields, where)
    theta = get_number(rope, "rope_theta", where, ConfigError, MAX_ROPE_THETA, 10000.0)
    if get_number(fields, "rope_theta", where, ConfigError, MAX_ROPE_THETA, theta) != theta and "rope_theta" in rope:
        raise ConfigError(f"{where}: rope_theta is {fields['rope_theta']:g}, and {theta:g} in rope_parameters")
    return {
        **dimensions,
        "num_kv_heads": integer("num_key_value_heads", dimensions["num_heads"]),
        "head_dim": integer("head_dim", max(1, dimensions["width"] // dimensions["num_heads"])),
        "norm_eps": get_number(fields, "rms_norm_eps", where, ConfigError, MAX_EPSILON, 1e-6),
        "max_length": integer("max_position_embeddings", 2048),
        "rope_theta": get_number(fields, "rope_theta", where, ConfigError, MAX_ROPE_THETA, theta),
        "rope_scaling": _rope_scaling(rope, where),
        "tie_embeddings": get_bool(fields, "tie_word_embeddings", where, ConfigError),
        "family": name,
        "qkv_bias": False,
        "qk_norm": False,
        **family.fixed,
    }


def _rope(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the config of rotary embeddings: `rope_parameters` of transformers 5, else `rope_scaling`."""
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(fields.get(name, {}), dict):
            raise ConfigError(f"{where}: {name} must be an object, not {format_value(fields[name])}")
    return fields.get("rope_parameters") or fields.get("rope_scaling") or {}


def _rope_scaling(rope: dict[str, Any], where: str) -> dict[str, Any] | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type not in ("linear", "llama3"):
        raise ConfigError(
            f"{where}: rotary scaling {format_value(rope_type)} is not supported; only linear and llama3 are"
        )
    names = ("factor", *(("low_freq_factor", "high_freq_factor") if rope_type == "llama3" else ()))
    needed = (*names, *(("original_max_position_embeddings",) if rope_type == "llama3" else ()))
    if missing := [name for name in needed if name not in rope]:
        raise ConfigError(f"{where}: rotary scaling {rope_type!r} has no {', '.join(missing)}")
    found = {"kind": rope_type} | {name: get_number(rope, name, where, ConfigError, MAX_ROPE_FACTOR) for name in names}
    if rope_type == "llama3":
        found["original_max_length"] = get_integer(rope, "original_max_position_embeddings", where, ConfigError)
    return found
