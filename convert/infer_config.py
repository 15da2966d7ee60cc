"""A model's dimensions, read off the shapes in its files; what shapes cannot tell comes from presets and --config."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vllama_jax import config as presets
from vllama_jax.config import VideoLlamaConfig, check_fields, from_dict, merge
from vllama_jax.convert import imagebind
from vllama_jax.convert.weight_files import Source
from vllama_jax.errors import CheckpointError, ConfigError

# Head counts leave no trace in shapes; these are the published models'.
HEADS = {
    "vit": {presets.EVA_G.width: presets.EVA_G.num_heads},
    "qformer": {presets.BLIP2_QFORMER.width: presets.BLIP2_QFORMER.num_heads},
    "imagebind.audio": {presets.IMAGEBIND_HUGE.audio.width: presets.IMAGEBIND_HUGE.audio.num_heads},
    "imagebind.vision": {presets.IMAGEBIND_HUGE.vision.width: presets.IMAGEBIND_HUGE.vision.num_heads},
}


def model_config(
    pieces: Mapping[str, Source],
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
    fields = known | {name: _over(known.get(name), told) for name, told in _told(pieces, llama_fields).items()}
    _fill_branches(fields)
    _check_override(override, fields)
    absent = {"imagebind", "audio_qformer"} - fields.keys()  # one --config may serve with and without these
    fields = merge(fields, {name: value for name, value in override.items() if name not in absent})
    _fill_heads(fields)
    cfg = from_dict(fields, VideoLlamaConfig, "model config")
    for part, kind, pattern, said_by in DEPTHS:
        if kind in pieces:
            _check_depth(part, getattr(cfg, part).depth, pieces[kind], pattern, said_by)
    return cfg


DEPTHS = (
    ("vit", "eva_vit", r"blocks\.(\d+)\.", '--config {"vit": {"depth": …}} says'),
    ("llama", "llama", r"model\.layers\.(\d+)\.", "its config.json says"),
)


def _told(pieces: Mapping[str, Source], llama_fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the pieces tell."""
    tell = {
        "eva_vit": lambda source: {"vit": _vit(source)},
        "blip2": lambda source: {"image_qformer": _qformer(source, "Qformer", "query_tokens")},
        "imagebind": lambda source: {"imagebind": _imagebind(source)},
        "vl": lambda source: {
            "video_qformer": _qformer(source, "video_Qformer", "video_query_tokens"),
            "num_frame_positions": source.shape("video_frame_position_embedding.weight", 2)[0],
        },
        "al": lambda source: {
            "audio_qformer": _qformer(source, "audio_Qformer", "audio_query_tokens"),
            "num_clip_positions": source.shape("audio_position_embedding.weight", 2)[0],
        },
        "llama": lambda source: {
            "llama": {**llama_fields, "vocab_size": source.shape("model.embed_tokens.weight", 2)[0]}
        },
    }
    return {name: told for kind in tell if kind in pieces for name, told in tell[kind](pieces[kind]).items()}


def _over(known: Any, told: Any) -> Any:
    """What a file tells, and beside it what was known of a part of the same width: head counts leave no trace."""
    if not isinstance(known, Mapping) or not isinstance(told, Mapping) or known.get("width") != told.get("width"):
        return told
    return {**known, **{name: _over(known.get(name), value) for name, value in told.items()}}


def _fill_branches(fields: dict[str, Any]) -> None:
    """Before a branch has a checkpoint, it is as it will be trained: two layers of the image Q-Former's size."""
    new = fields["image_qformer"] | {"depth": presets.VIDEO_QFORMER.depth, "cross_attention_every": 1}
    fields.setdefault("video_qformer", new | {"num_queries": presets.VIDEO_QFORMER.num_queries})
    if "imagebind" in fields:
        fields.setdefault("audio_qformer", new | {"num_queries": presets.AUDIO_QFORMER.num_queries})


def _check_override(override: Mapping[str, Any], fields: Mapping[str, Any], where: str = "--config") -> None:
    """Raises ConfigError for a field that is unknown, is no object where the model has a part, or is no count."""
    if where == "--config":
        check_fields(override, VideoLlamaConfig, where)
    for name, value in override.items():
        if isinstance(fields.get(name), Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}.{name}: {value!r} is not an object")
            _check_override(value, fields[name], f"{where}.{name}")
        elif type(value) is int and value < 1:
            raise ConfigError(f"{where}.{name} must be above 0, not {value}")


def _fill_heads(fields: dict[str, Any]) -> None:
    """Puts the published head counts where none is given; lists every place where there is none to put."""
    places = {"vit": fields["vit"]} | {name: fields[name] for name in fields if name.endswith("_qformer")}
    if imagebind_fields := fields.get("imagebind"):
        places |= {f"imagebind.{sense}": imagebind_fields[sense] for sense in ("audio", "vision")}
    unknown = []
    for path, part in places.items():
        known = HEADS["qformer" if path.endswith("_qformer") else path]
        if "num_heads" not in part and part["width"] in known:
            part["num_heads"] = known[part["width"]]
        elif "num_heads" not in part:
            unknown.append(path)
    if unknown:
        raise ConfigError(
            f"the number of attention heads of {', '.join(unknown)} cannot be read off the files, and their widths are "
            'not the published ones; give a --config file with, for example, {"vit": {"num_heads": 4}}'
        )


def _check_depth(part: str, depth: int, source: Source, pattern: str, said_by: str) -> None:
    """Fewer layers than the model has would be a long list of missing tensors, and so one line here."""
    held = count_layers(source, pattern)
    if held < depth:
        raise ConfigError(f"{source.label}: holds {held} layers, and {part} has {depth}; {said_by} how many there are")


def count_layers(source: Source, pattern: str) -> int:
    """How many layers a file holds: one more than the largest number that `pattern` catches in a name."""
    found = [int(match[1]) for name in source.shapes if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def _vit(source: Source) -> dict[str, Any]:
    width, _, _, patch_size = source.shape("patch_embed.proj.weight", 4)
    held = count_layers(source, r"blocks\.(\d+)\.")
    return {
        "image_size": patch_size * math.isqrt(source.shape("pos_embed", 3)[1] - 1),
        "patch_size": patch_size,
        "width": width,
        "depth": presets.EVA_G.depth if width == presets.EVA_G.width else held - 1,  # BLIP-2 drops EVA's last block
        "mlp_dim": source.shape("blocks.0.mlp.fc1.weight", 2)[0],
    }


def _qformer(source: Source, module: str, queries: str) -> dict[str, Any]:
    layer = f"{module}.bert.encoder.layer"
    depth = count_layers(source, rf"{re.escape(layer)}\.(\d+)\.")
    every_second = depth > 1 and f"{layer}.1.crossattention.self.query.weight" not in source
    _, num_queries, width = source.shape(queries, 3)
    return {
        "width": width,
        "depth": depth,
        "mlp_dim": source.shape(f"{layer}.0.intermediate_query.dense.weight", 2)[0],
        "num_queries": num_queries,
        "cross_attention_every": 2 if every_second else 1,
    }


def _imagebind(source: Source) -> dict[str, Any]:
    stem = "modality_preprocessors"
    audio_width, _, _, audio_patch = source.shape(f"{stem}.audio.rgbt_stem.proj.weight", 4)
    width, _, frames, _, patch_size = source.shape(f"{stem}.vision.rgbt_stem.proj.1.weight", 5)
    audio = {"width": audio_width, "patch_size": audio_patch, **_trunk(source, "audio")}
    if imagebind.AUDIO_SCALE in source:
        if math.prod(source.shapes[imagebind.AUDIO_SCALE]) != 1:
            raise CheckpointError(f"{source.label}: {imagebind.AUDIO_SCALE} is not a single number")
        audio["log_logit_scale"] = np.float32(source.read(imagebind.AUDIO_SCALE).item()).item()
    vision = {
        "width": width,
        "frames_per_patch": frames,
        "patch_size": patch_size,
        "image_size": patch_size * math.isqrt(source.shape(f"{stem}.vision.pos_embedding_helper.pos_embed", 3)[1] - 1),
        **_trunk(source, "vision"),
    }
    return {"embed_dim": source.shape("modality_heads.audio.2.weight", 2)[0], "audio": audio, "vision": vision}


def _trunk(source: Source, sense: str) -> dict[str, Any]:
    blocks = f"modality_trunks.{sense}.blocks"
    return {
        "depth": count_layers(source, rf"{re.escape(blocks)}\.(\d+)\."),
        "mlp_dim": source.shape(f"{blocks}.0.mlp.fc1.weight", 2)[0],
    }
