"""A model's dimensions, read off the shapes in its files; what shapes cannot tell comes from presets and --config."""

from collections.abc import Iterable, Mapping
from typing import Any

from vllama_jax import config as presets
from vllama_jax.config import VideoLlamaConfig, check_fields, from_dict, merge
from vllama_jax.convert.components import FILE_SPECS
from vllama_jax.convert.weight_files import Source, count_layers
from vllama_jax.errors import ConfigError

# Head counts leave no trace in shapes; these are the published models'.
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
    """The config of the model that the pieces make up.

    llama_fields: what config.json tells of the language model. override: any part of a config; it wins, and what it
    says of the audio branch is left aside when the model has none. known: the fields of a model directory whose parts
    are used where there is no piece.
    Raises ConfigError for unknown or wrong fields in `override`, where a head count is neither known nor given, and
    where a file has not the layers it should; CheckpointError where a file lacks a tensor that tells a dimension.
    """
    known = dict(known or {})
    inferred = _inferred_fields(sources, llama_fields)
    if "extra_branches" in inferred:
        inferred["extra_branches"] = join_branches(known.get("extra_branches", ()), inferred["extra_branches"])
    fields = known | {name: _merge_inferred(known.get(name), value) for name, value in inferred.items()}
    _add_missing_branches(fields)
    _check_override(override, fields)
    absent = {"imagebind", "audio_qformer"} - fields.keys()  # one --config may serve with and without these
    fields = merge(fields, {name: value for name, value in override.items() if name not in absent})
    _fill_heads(fields)
    cfg = from_dict(fields, VideoLlamaConfig, "model config")
    for file_type, source in sources.items():
        if layers := FILE_SPECS[file_type].layers:
            _check_depth(layers.component, getattr(cfg, layers.component).depth, source, layers.pattern, layers.advice)
    return cfg


def _inferred_fields(sources: Mapping[str, Source], llama_fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the pieces tell."""
    inferred: dict[str, Any] = {}
    for file_type, source in sources.items():
        for name, value in FILE_SPECS[file_type].infer(source).items():
            inferred[name] = join_branches(inferred.get(name, ()), value) if name == "extra_branches" else value
    return inferred | ({"llama": {**llama_fields, **inferred["llama"]}} if "llama" in inferred else {})


def join_branches(known: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The configs of additional branches; of two of one type that in `others`."""
    return list({branch["type"]: branch for branch in (*known, *others)}.values())


def _merge_inferred(known: Any, inferred: Any) -> Any:
    """What a file tells, and beside it what was known of a part of the same width: head counts leave no trace."""
    if not isinstance(known, Mapping) or not isinstance(inferred, Mapping):
        return inferred
    if any(known.get(name) != inferred.get(name) for name in ("width", "type")):
        return inferred
    return {**known, **{name: _merge_inferred(known.get(name), value) for name, value in inferred.items()}}


def _add_missing_branches(fields: dict[str, Any]) -> None:
    """Before a branch has a checkpoint, it is as it will be trained: two layers of the image Q-Former's size."""
    new = fields["image_qformer"] | {"depth": presets.VIDEO_QFORMER.depth, "cross_attention_every": 1}
    fields.setdefault("video_qformer", new | {"num_queries": presets.VIDEO_QFORMER.num_queries})
    if "imagebind" in fields:
        fields.setdefault("audio_qformer", new | {"num_queries": presets.AUDIO_QFORMER.num_queries})


def _check_override(override: Mapping[str, Any], fields: Mapping[str, Any], where: str = "--config") -> None:
    """Raises ConfigError for a field that is unknown, is no object where the model has a part, or is no count."""
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
    """Fields that are given for a part, with the part's type, by which they are known."""
    return {
        name: {"type": fields[name]["type"], **value}
        if isinstance(value, Mapping) and isinstance(fields.get(name), Mapping) and "type" in fields[name]
        else value
        for name, value in override.items()
    }


def _fill_heads(fields: dict[str, Any]) -> None:
    """Puts the published head counts where none is given; lists every place where there is none to put."""
    places = {"vit": fields["vit"]} | {name: fields[name] for name in fields if name.endswith("_qformer")}
    if imagebind_fields := fields.get("imagebind"):
        places |= {f"imagebind.{modality}": imagebind_fields[modality] for modality in ("audio", "vision")}
    unknown = []
    for path, component in places.items():
        known = published_heads(path, "type" in component)
        if "num_heads" not in component and component["width"] in known:
            component["num_heads"] = known[component["width"]]
        elif "num_heads" not in component:
            unknown.append(path)
    if unknown:
        raise ConfigError(
            f"the number of attention heads of {', '.join(unknown)} cannot be read off the files, and their widths are "
            'not the published ones; give a --config file with, for example, {"vit": {"num_heads": 4}}'
        )


def published_heads(path: str, typed: bool) -> Mapping[int, int]:
    """The head counts of the published models by width. typed: whether the part is no EVA-CLIP, which tells its own."""
    return {} if typed else PUBLISHED_HEADS["qformer" if path.endswith("_qformer") else path]


def _check_depth(component: str, depth: int, source: Source, pattern: str, advice: str) -> None:
    """Fewer layers than the model has would be a long list of missing tensors, and so one line here."""
    held = count_layers(source, pattern)
    if held < depth:
        raise ConfigError(
            f"{source.label}: holds {held} layers, and {component} has {depth}; {advice} how many there are"
        )
