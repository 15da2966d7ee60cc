"""An example branch, registered from outside of the package: a patch embedding of frames, then a Q-Former.

Its weights are one file: the patch embedding, the Q-Former and the layers around it.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from vllama_jax.branches import Branch, Encoder
from vllama_jax.config import QFormerConfig, VideoLlamaConfig
from vllama_jax.convert import qformer
from vllama_jax.convert.components import FileSpec
from vllama_jax.convert.rules import IDENTITY, Rule, linear
from vllama_jax.convert.weight_files import Source
from vllama_jax.nn.layers import axis_metadata, cast_like, learned_positions, patchify, position_rows, projection
from vllama_jax.nn.qformer import QFormer
from vllama_jax.towers import Tower

NAME = "motion"
HEADS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MotionTowerConfig:
    image_size: int
    patch_size: int
    width: int

    depth = 1
    num_heads = 1

    @property
    def mlp_dim(self) -> int:
        return self.width

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class MotionConfig:
    type: str = NAME
    encoder: MotionTowerConfig
    qformer: QFormerConfig
    num_positions: int


class MotionBranch(nnx.Module):
    def __init__(self, cfg: MotionConfig, model: VideoLlamaConfig, *, rngs: nnx.Rngs):
        self.patch_size, width = cfg.encoder.patch_size, cfg.encoder.width
        self.encoder = nnx.Linear(3 * self.patch_size**2, width, rngs=rngs, **axis_metadata(None, "embed"))
        self.positions = learned_positions(cfg.num_positions, width, rngs)
        self.qformer = QFormer(cfg.qformer, width, rngs=rngs)
        self.projection = projection(cfg.qformer.width, model.llama.width, rngs)

    def encode(self, frames: jax.Array) -> jax.Array:
        """Encode normalized frames [b, t, h, w, 3] to features [b, t, n, d]."""
        b, t = frames.shape[:2]
        patches = patchify(frames.reshape(b * t, *frames.shape[2:]), self.patch_size)
        return self.encoder(cast_like(patches, self.encoder.kernel)).reshape(b, t, patches.shape[1], -1)

    def tokens(self, features: jax.Array, *, interpolate_positions: bool = False, dropout: Any = None) -> jax.Array:
        """Map features [b, t, n, d] to media tokens [b, q, w]."""
        rows = position_rows(self.positions, features.shape[1], interpolate=interpolate_positions, what="frames")
        memory = cast_like(features, self.positions) + rows[:, None]
        return self.projection(self.qformer(memory.reshape(len(memory), -1, memory.shape[-1]), dropout))


def config_of(model: VideoLlamaConfig) -> MotionConfig:
    return model.extra_branch(NAME)


TOWER = Tower(module=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), scanned=False)
BRANCH = Branch(
    name=NAME,
    encoders={
        "frames": Encoder(
            components={"motion/encoder": lambda model: config_of(model).encoder},
            encode=lambda network, frames: network.motion.encode(frames),
        )
    },
    prompt_array="frames",
    feature_shape=lambda model: (config_of(model).encoder.num_tokens, config_of(model).encoder.width),
    qformer="motion/qformer",
    positions="motion/positions",
    projection="motion/projection",
    qformer_config=lambda model: config_of(model).qformer,
    tokens=lambda network, features, **options: network.motion.tokens(features, **options),
    is_in=lambda model: config_of(model) is not None,
    advice="convert it with a motion checkpoint",
    without=lambda model: model.without_branch(NAME),
    config=MotionConfig,
    module="extension_motion:MotionBranch",
)


def rules(cfg: MotionConfig) -> list[Rule]:
    return [
        *linear("motion/encoder", "motion_encoder"),
        *qformer.rules("motion/qformer", "motion_Qformer", "motion_query_tokens", cfg.qformer),
        Rule("motion/positions", ("motion_position_embedding.weight",), IDENTITY),
        *linear("motion/projection", "motion_llama_proj"),
    ]


def infer(source: Source) -> dict[str, Any]:
    """Infer the branch's config. Shapes determine neither the patch size and channels separately, nor head counts."""
    width, patch = source.shape("motion_encoder.weight", 2)
    encoder = {"image_size": 32, "patch_size": round((patch / 3) ** 0.5), "width": width}
    return {
        "type": NAME,
        "encoder": encoder,
        "qformer": qformer.infer(source, "motion_Qformer", "motion_query_tokens") | {"num_heads": HEADS},
        "num_positions": source.shape("motion_position_embedding.weight", 2)[0],
    }


FILE_SPEC = FileSpec(
    "a motion checkpoint",
    "",
    "motion_query_tokens",
    BRANCH.components,
    lambda cfg: rules(config_of(cfg)),
    lambda _: {},
    lambda source: {"extra_branches": [infer(source)]},
    applies=BRANCH.is_in,
    branch=NAME,
)
