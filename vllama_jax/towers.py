"""Vision towers: the encoders of frames. One table says what the rest of the program must know of each.

To add one: its config class and a line of the table here, its module in `nn/`, its rules in `convert/`
(docs/architecture.md). Importing this file imports no jax.
"""

import dataclasses
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol

from vllama_jax.errors import ConfigError
from vllama_jax.io.json_fields import format_value

# CLIP's mean and standard deviation of red, green and blue, for values in 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class TowerConfig(Protocol):
    """What the config of every tower has.

    One that can be a model's `vit` besides EVA-CLIP has a field `type`, whose default is its name in config.json.

    Attributes:
        image_size: Height and width of a frame, in pixels.
        width: Of its blocks and, as `vit`, of the features.
        depth: Number of blocks.
        num_heads: Attention heads of a block.
        mlp_dim: Width of a block's feed-forward layer.
        num_tokens: Of a frame in its blocks; as `vit`, the number of features.
    """

    @property
    def image_size(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
    """EVA-CLIP's vision transformer (reference: eva_vit.py)."""

    image_size: int = 224
    patch_size: int = 14
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    norm_eps: float = 1e-6

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """The patches and the class token."""
        return self.num_patches + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageBindVisionConfig(VitConfig):
    """ImageBind's vision tower (reference: ImageBind/models). A picture is seen as `frames_per_patch` equal frames."""

    frames_per_patch: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """What a tower is besides its config.

    Attributes:
        module: Where its network is, as "package.module:Class"; Class(config, rngs=rngs) maps normalized frames
            [b, h, w, 3] to features [b, num_tokens, width]. None for a tower that another module builds.
        mean: Of red, green and blue, for values in 0..1.
        std: Their standard deviations.
        scanned: Whether its blocks are stacked as `blocks` and run by `lax.scan`, which gathers one at a time.
        quantized: Its linear layers that int8 and int4 quantize, by the path of the module they are in.
    """

    module: str | None
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    scanned: bool = True
    quantized: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


TOWERS: dict[type, Tower] = {
    VitConfig: Tower(
        module="vllama_jax.nn.eva_vit:EvaVit",
        quantized={"blocks/attention": ("qkv", "out"), "blocks/mlp": ("up", "down")},
    ),
    ImageBindVisionConfig: Tower(module=None),
}


def get_tower(config: TowerConfig) -> Tower:
    """The entry of a tower's config. Raises ConfigError for a config class that is not in the table."""
    if type(config) not in TOWERS:
        known = ", ".join(cls.__name__ for cls in TOWERS)
        raise ConfigError(f"{type(config).__name__} is no config of a vision tower; known are {known}")
    return TOWERS[type(config)]


def is_scanned(config: Any) -> bool:
    """Whether the blocks of a config's module are stacked; only towers of the table may have others."""
    return type(config) not in TOWERS or TOWERS[type(config)].scanned


def build_tower(config: TowerConfig, rngs: Any) -> Any:
    """The network of a tower that can be a model's `vit`."""
    module = get_tower(config).module
    if module is None:
        raise ConfigError(f"vit: {type(config).__name__} is part of another encoder and cannot be used alone")
    return pkgutil.resolve_name(module)(config, rngs=rngs)


def get_tower_class(fields: Mapping[str, Any], where: str) -> type:
    """The config class of a tower's fields in config.json: by `type`, EVA-CLIP's where there is none.

    Raises:
        ConfigError: The type is unknown.
    """
    if "type" not in fields:
        return VitConfig
    known = {cls.type: cls for cls in TOWERS if hasattr(cls, "type")}
    name = fields["type"]
    if not isinstance(name, str) or name not in known:
        names = ", ".join(known) or "none"
        raise ConfigError(
            f"{where}.type: unknown vision tower {format_value(name)}; known are {names} (EVA-CLIP has no type)"
        )
    return known[name]
