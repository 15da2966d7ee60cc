"""Infer the config of a model from tensor shapes. What shapes do not determine comes from presets and --config."""

from collections.abc import Iterable, Mapping
from typing import Any

from vllama_jax import config as presets
from vllama_jax.config import VideoLlamaConfig, check_fields, from_dict, merge
from vllama_jax.convert.components import FILE_SPECS
from vllama_jax.convert.weight_files import Source, count_layers
from vllama_jax.errors import ConfigError

# Shapes do not determine head counts. These are the head counts of the published models, by width.
PUBLISHED_HEADS = {
    "vit": {presets.EVA_G.width: presets.EVA_G.num_heads},
    "qformer": {presets.BLIP2_QFORMER.width: presets.BLIP2_QFORMER.num_heads},
    "imagebind.audio": {presets.IMAGEBIND_HUGE.audio.width: presets.IMAGEBIND_HUGE.audio.num_heads},
    "imagebind.vision": {presets.IMAGEBIND_HUGE.vision.width: presets.IMAGEBIND_HUGE.vision.num_heads},
}


def infer_model_config(
    sources: Mapping[str, Source],
    llama_fields: Mapping[str, Any],
    override: Mapping[str, Any],
    known: Mapping[str, Any] | None = None,
) -> VideoLlamaConfig:
    """Infer the config of the model that the sources make.

    Args:
        sources: The files by file type.
        llama_fields: The fields of LlamaConfig from the language model's config.json.
        override: Config fields that take precedence. Those of the audio branch are ignored if the model has none, so
            that one --config file serves for both.
        known: Config fields of the model directories that provide components without a file.

    Raises:
        ConfigError: `override` has unknown or invalid fields, a head count is not known, or a file has fewer layers
            than the config.
        CheckpointError: A tensor that determines a dimension is missing or has the wrong number of axes.
    """
    known = dict(known or {})
    inferred = _inferred_fields(sources, llama_fields)
    if "extra_branches" in inferred:
        inferred["extra_branches"] = join_branches(known.get("extra_branches", ()), inferred["extra_branches"])
    fields = known | {name: _merge_inferred(known.get(name), value) for name, value in inferred.items()}
    _add_missing_branches(fields)
    _check_override(override, fields)
    absent = {"imagebind", "audio_qformer"} - fields.keys()
    fields = merge(fields, {name: value for name, value in override.items() if name not in absent})
    _fill_heads(fields)
    cfg = from_dict(fields, VideoLlamaConfig, "model config")
    for file_type, source in sources.items():
        if layers := FILE_SPECS[file_type].layers:
            _check_depth(layers.component, getattr(cfg, layers.component).depth, source, layers.pattern, layers.advice)
    return cfg


def _inferred_fields(sources: Mapping[str, Source], llama_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config fields that the sources determine."""
    inferred: dict[str, Any] = {}
    for file_type, source in sources.items():
        for name, value in FILE_SPECS[file_type].infer(source).items():
            inferred[name] = join_branches(inferred.get(name, ()), value) if name == "extra_branches" else value
    return inferred | ({"llama": {**llama_fields, **inferred["llama"]}} if "llama" in inferred else {})


def join_branches(known: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Join two lists of configs of additional branches. For a type in both, the config of `others` is used."""
    return list({branch["type"]: branch for branch in (*known, *others)}.values())


def _merge_inferred(known: Any, inferred: Any) -> Any:
    """Return the inferred fields, and known ones, such as head counts, if the component has the same width and type."""
    if not isinstance(known, Mapping) or not isinstance(inferred, Mapping):
        return inferred
    if any(known.get(name) != inferred.get(name) for name in ("width", "type")):
        return inferred
    return {**known, **{name: _merge_inferred(known.get(name), value) for name, value in inferred.items()}}


def _add_missing_branches(fields: dict[str, Any]) -> None:
    """Add the config of branches without a checkpoint: Q-Formers of two layers with the image Q-Former's width."""
    new = fields["image_qformer"] | {"depth": presets.VIDEO_QFORMER.depth, "cross_attention_every": 1}
    fields.setdefault("video_qformer", new | {"num_queries": presets.VIDEO_QFORMER.num_queries})
    if "imagebind" in fields:
        fields.setdefault("audio_qformer", new | {"num_queries": presets.AUDIO_QFORMER.num_queries})


def _check_override(override: Mapping[str, Any], fields: Mapping[str, Any], where: str = "--config") -> None:
    """Raise ConfigError for an unknown field, a value that should be an object, or an integer below 1."""
    if where == "--config":
        check_fields(_with_types(override, fields), VideoLlamaConfig, where)
    for name, value in override.items():
        if isinstance(fields.get(name), Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}.{name}: {value!r} is not an object")
            _check_override(value, fields[name], f"{where}.{name}")
        elif type(value) is int and value < 1:
            raise ConfigError(f"{where}.{name} must be above 0, not {value}")


def _with_types(override: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Add the type of a component to the fields that `override` has for it, so that they can be checked."""
    return {
        name: {"type": fields[name]["type"], **value}
        if isinstance(value, Mapping) and isinstance(fields.get(name), Mapping) and "type" in fields[name]
        else value
        for name, value in override.items()
    }


def _fill_heads(fields: dict[str, Any]) -> None:
    """Set missing head counts to the published ones. Raise ConfigError for components of other widths."""
    components = {"vit": fields["vit"]} | {name: fields[name] for name in fields if name.endswith("_qformer")}
    if imagebind_fields := fields.get("imagebind"):
        components |= {f"imagebind.{modality}": imagebind_fields[modality] for modality in ("audio", "vision")}
    unknown = []
    for path, component in components.items():
        known = published_heads(path, "type" in component)
        if "num_heads" not in component and component["width"] in known:
            component["num_heads"] = known[component["width"]]
        elif "num_heads" not in component:
            unknown.append(path)
    if unknown:
        raise ConfigError(
            f"the files do not determine the number of attention heads of {', '.join(unknown)}, and their widths are "
            'not those of published models; give a --config file with, for example, {"vit": {"num_heads": 4}}'
        )


def published_heads(path: str, has_type: bool) -> Mapping[int, int]:
    """Return the head counts of the published models by width.

    Args:
        path: The component in the config, such as "vit" or "imagebind.audio".
        has_type: Whether its config has a field `type`: an encoder other than EVA-CLIP, which infers its head count.
    """
    return {} if has_type else PUBLISHED_HEADS["qformer" if path.endswith("_qformer") else path]


def _check_depth(component: str, depth: int, source: Source, pattern: str, advice: str) -> None:
    """Raise a ConfigError of one line for missing layers, in place of a long list of missing tensors."""
    num_layers = count_layers(source, pattern)
    if num_layers < depth:
        raise ConfigError(f"{source.label}: has {num_layers} layers, but {component}.depth is {depth}; {advice}")
