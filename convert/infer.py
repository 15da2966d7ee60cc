"""A model's dimensions, read off the shapes in its files; what shapes cannot tell comes from presets and --config."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vllama_jax import config as presets
from vllama_jax.config import VideoLlamaConfig, check_fields, from_dict, merge
from vllama_jax.errors import ConfigError

from . import imagebind, llama
from .sources import Source

# Head counts leave no trace in shapes; these are the published models'.
HEADS = {
    "vit": {presets.EVA_G.width: presets.EVA_G.num_heads},
    "qformer": {presets.BLIP2_QFORMER.width: presets.BLIP2_QFORMER.num_heads},
    "imagebind.audio": {presets.IMAGEBIND_HUGE.audio.width: presets.IMAGEBIND_HUGE.audio.num_heads},
    "imagebind.vision": {presets.IMAGEBIND_HUGE.vision.width: presets.IMAGEBIND_HUGE.vision.num_heads},
}


def model_config(
    pieces: Mapping[str, Source], llama_directory: Path, override: Mapping[str, Any], template: str
) -> VideoLlamaConfig:
    """The config of the model that the pieces make up. `override` is any part of a config and wins.

    Raises ConfigError for unknown fields in `override`, and where a head count is neither known nor given.
    """
    check_fields(override, VideoLlamaConfig, "--config")
    image = _qformer(pieces["blip2"], "Qformer", "query_tokens")
    video = _video_qformer(pieces.get("vl"), "video", image, presets.VIDEO_QFORMER.num_queries)
    fields = {
        "vit": _vit(pieces["eva_vit"], override.get("vit", {})),
        "image_qformer": image,
        "video_qformer": video,
        "num_frame_positions": _rows(pieces.get("vl"), "video_frame_position_embedding.weight", 32),
        "llama": _llama(pieces["llama"], llama_directory),
        "template": template,
    }
    if "imagebind" in pieces:
        scale_given = override.get("imagebind", {}).get("audio", {})
        fields |= {
            "imagebind": _imagebind(pieces["imagebind"], scale_given),
            "audio_qformer": _video_qformer(pieces.get("al"), "audio", image, presets.AUDIO_QFORMER.num_queries),
            "num_clip_positions": _rows(pieces.get("al"), "audio_position_embedding.weight", 8),
        }
    fields = merge(fields, override)
    _fill_heads(fields)
    return from_dict(fields, VideoLlamaConfig, "--config")


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


def count_layers(source: Source, pattern: str) -> int:
    """How many layers a file holds: one more than the largest number that `pattern` catches in a name."""
    found = [int(match[1]) for name in source.shapes if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def _vit(source: Source, override: Mapping[str, Any]) -> dict[str, Any]:
    width, _, patch_size, _ = source.shapes["patch_embed.proj.weight"]
    held = count_layers(source, r"blocks\.(\d+)\.")
    depth = presets.EVA_G.depth if width == presets.EVA_G.width else held - 1  # BLIP-2 drops EVA's last block
    return {
        "image_size": patch_size * math.isqrt(source.shapes["pos_embed"][1] - 1),
        "patch_size": patch_size,
        "width": width,
        "depth": override.get("depth", depth),
        "mlp_dim": source.shapes["blocks.0.mlp.fc1.weight"][0],
    }


def _qformer(source: Source, module: str, queries: str) -> dict[str, Any]:
    layer = rf"{module}\.bert\.encoder\.layer"
    depth = count_layers(source, rf"{layer}\.(\d+)\.")
    every_second = depth > 1 and f"{module}.bert.encoder.layer.1.crossattention.self.query.weight" not in source
    return {
        "width": source.shapes[queries][2],
        "depth": depth,
        "mlp_dim": source.shapes[f"{module}.bert.encoder.layer.0.intermediate_query.dense.weight"][0],
        "num_queries": source.shapes[queries][1],
        "cross_attention_every": 2 if every_second else 1,
    }


def _video_qformer(source: Source | None, sense: str, image: dict[str, Any], num_queries: int) -> dict[str, Any]:
    """From the branch's checkpoint; before there is one, two layers of the image Q-Former's size."""
    if source is not None:
        return _qformer(source, f"{sense}_Qformer", f"{sense}_query_tokens")
    return image | {"depth": presets.VIDEO_QFORMER.depth, "num_queries": num_queries, "cross_attention_every": 1}


def _rows(source: Source | None, name: str, default: int) -> int:
    return default if source is None else source.shapes[name][0]


def _imagebind(source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    audio_width, _, audio_patch, _ = source.shapes["modality_preprocessors.audio.rgbt_stem.proj.weight"]
    kernel = source.shapes["modality_preprocessors.vision.rgbt_stem.proj.1.weight"]
    vision_positions = source.shapes["modality_preprocessors.vision.pos_embedding_helper.pos_embed"][1]

    def trunk(sense: str) -> dict[str, Any]:
        name = f"modality_trunks.{sense}.blocks"
        return {
            "depth": count_layers(source, rf"modality_trunks\.{sense}\.blocks\.(\d+)\."),
            "mlp_dim": source.shapes[f"{name}.0.mlp.fc1.weight"][0],
        }

    audio = {"width": audio_width, "patch_size": audio_patch, **trunk("audio")}
    if "log_logit_scale" not in given and imagebind.AUDIO_SCALE in source:
        audio["log_logit_scale"] = source.read(imagebind.AUDIO_SCALE).astype(np.float32).item()
    vision = {
        "width": kernel[0],
        "frames_per_patch": kernel[2],
        "patch_size": kernel[3],
        "image_size": kernel[3] * math.isqrt(vision_positions - 1),
        **trunk("vision"),
    }
    return {"embed_dim": source.shapes["modality_heads.audio.2.weight"][0], "audio": audio, "vision": vision}


def _llama(source: Source, directory: Path) -> dict[str, Any]:
    fields = llama.read_config(directory)
    return fields | {"vocab_size": source.shapes["model.embed_tokens.weight"][0]}
