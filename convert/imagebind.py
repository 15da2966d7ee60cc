"""Rules of ImageBind's file (imagebind_huge.pth, six towers) for `imagebind/audio` and `imagebind/vision`."""

import math
import re
from typing import Any

import numpy as np

from vllama_jax.config import ImageBindAudioConfig, ImageBindConfig
from vllama_jax.convert.rules import (
    CONVOLUTION,
    SQUEEZE_TO_MATRIX,
    SQUEEZE_TO_VECTOR,
    Rule,
    Transform,
    from_heads,
    linear,
    norm,
    patch_kernel,
    to_heads_bias,
    to_heads_kernel,
)
from vllama_jax.convert.weight_files import Source, count_layers
from vllama_jax.errors import CheckpointError
from vllama_jax.towers import ImageBindVisionConfig

UNUSED_TENSORS = {
    r"modality_(preprocessors|trunks|heads|postprocessors)\.(text|depth|thermal|imu)\..*": (
        "Video-LLaMA uses ImageBind's audio and vision towers only"
    ),
}
AUDIO_SCALE = "modality_postprocessors.audio.1.log_logit_scale"

TEXT_LENGTH = 77
OTHER_SCALES = {"depth": 5.0, "thermal": 10.0, "imu": 5.0}  # reference: imagebind_model.py:429


def buffers(cfg: ImageBindConfig) -> dict[str, np.ndarray]:
    """Return ImageBind's constant buffers by name. The original saves them in checkpoints of the audio branch."""
    scale = "modality_postprocessors.{}.1.log_logit_scale"
    return {
        AUDIO_SCALE: np.asarray(cfg.audio.log_logit_scale, np.float32),
        "modality_preprocessors.text.mask": np.triu(np.full((TEXT_LENGTH, TEXT_LENGTH), -np.inf, np.float32), 1),
        **{scale.format(tower): np.asarray(np.log(value), np.float32) for tower, value in OTHER_SCALES.items()},
    }


def rules(cfg: ImageBindConfig) -> list[Rule]:
    """Return the rule table of both towers."""
    return [*_audio_rules(cfg.audio), *_vision_rules(cfg.vision)]


def _audio_rules(cfg: ImageBindAudioConfig) -> list[Rule]:
    target, layers, heads = "imagebind/audio", range(cfg.depth), (cfg.num_heads, cfg.width // cfg.num_heads)
    stem = "modality_preprocessors.audio.rgbt_stem"
    attention = "modality_trunks.audio.blocks.{i}.attn"
    return [
        Rule(f"{target}/patch_embed/kernel", (f"{stem}.proj.weight",), CONVOLUTION),
        *norm(f"{target}/stem_norm", f"{stem}.norm_layer"),
        *_tower_rules(target, "audio", cfg),
        Rule(f"{target}/blocks/attention/extra_key", (f"{attention}.bias_k",), _split_row(*heads), layers),
        Rule(f"{target}/blocks/attention/extra_value", (f"{attention}.bias_v",), _split_row(*heads), layers),
    ]


def _vision_rules(cfg: ImageBindVisionConfig) -> list[Rule]:
    target = "imagebind/vision"
    kernel = "modality_preprocessors.vision.rgbt_stem.proj.1.weight"
    return [
        Rule(f"{target}/patch_embed", (kernel,), patch_kernel(cfg.frames_per_patch, cfg.patch_size, cfg.patch_size)),
        *norm(f"{target}/trunk_norm", "modality_trunks.vision.pre_transformer_layer.0"),
        *_tower_rules(target, "vision", cfg),
    ]


def _tower_rules(target: str, modality: str, cfg: ImageBindAudioConfig | ImageBindVisionConfig) -> list[Rule]:
    """Return the rules that both towers have in common."""
    layers, heads = range(cfg.depth), (cfg.num_heads, cfg.width // cfg.num_heads)
    stem, trunk = f"modality_preprocessors.{modality}", f"modality_trunks.{modality}.blocks.{{i}}"
    blocks, qkv = f"{target}/blocks", f"{target}/blocks/attention/qkv"
    return [
        Rule(f"{target}/class_token", (f"{stem}.cls_token",), SQUEEZE_TO_VECTOR),
        Rule(f"{target}/positions", (f"{stem}.pos_embedding_helper.pos_embed",), SQUEEZE_TO_MATRIX),
        *norm(f"{blocks}/norm1", f"{trunk}.norm_1", layers),
        Rule(f"{qkv}/kernel", (f"{trunk}.attn.in_proj_weight",), to_heads_kernel(3, *heads), layers),
        Rule(f"{qkv}/bias", (f"{trunk}.attn.in_proj_bias",), to_heads_bias(3, *heads), layers),
        *from_heads(f"{blocks}/attention/out", f"{trunk}.attn.out_proj", cfg.num_heads, layers),
        *norm(f"{blocks}/norm2", f"{trunk}.norm_2", layers),
        *linear(f"{blocks}/mlp/up", f"{trunk}.mlp.fc1", layers),
        *linear(f"{blocks}/mlp/down", f"{trunk}.mlp.fc2", layers),
        *norm(f"{target}/head_norm", f"modality_heads.{modality}.0"),
        *linear(f"{target}/head", f"modality_heads.{modality}.2", bias=False),
    ]


def _split_row(heads: int, head_dim: int) -> Transform:
    """Return the transform of a row that is split into heads: [1, 1, h·k] ↔ [h, k]."""
    return Transform(lambda x: x.reshape(heads, head_dim), lambda x: (x.reshape(1, 1, -1),))


def infer(source: Source) -> dict[str, Any]:
    """Infer the fields of ImageBindConfig that the file determines: all but the head counts."""
    stem = "modality_preprocessors"
    audio_width, _, _, audio_patch = source.shape(f"{stem}.audio.rgbt_stem.proj.weight", 4)
    width, _, frames, _, patch_size = source.shape(f"{stem}.vision.rgbt_stem.proj.1.weight", 5)
    audio = {"width": audio_width, "patch_size": audio_patch, **_infer_trunk(source, "audio")}
    if AUDIO_SCALE in source:
        if math.prod(source.shapes[AUDIO_SCALE]) != 1:
            raise CheckpointError(f"{source.label}: {AUDIO_SCALE} is not a single number")
        audio["log_logit_scale"] = np.float32(source.read(AUDIO_SCALE).item()).item()
    vision = {
        "width": width,
        "frames_per_patch": frames,
        "patch_size": patch_size,
        "image_size": patch_size * math.isqrt(source.shape(f"{stem}.vision.pos_embedding_helper.pos_embed", 3)[1] - 1),
        **_infer_trunk(source, "vision"),
    }
    return {"embed_dim": source.shape("modality_heads.audio.2.weight", 2)[0], "audio": audio, "vision": vision}


def _infer_trunk(source: Source, modality: str) -> dict[str, Any]:
    blocks = f"modality_trunks.{modality}.blocks"
    return {
        "depth": count_layers(source, rf"{re.escape(blocks)}\.(\d+)\."),
        "mlp_dim": source.shape(f"{blocks}.0.mlp.fc1.weight", 2)[0],
    }
