"""Vision towers: the encoders of frames. The table `TOWERS` has an entry for each.

To add a tower, add its config class and its entry here, its module in `nn/` and its rules in `convert/`
(docs/extending.md). Importing this module imports no jax.
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
    """The interface of the configs of all towers.

    A config that can take the place of EVA-CLIP's as a model's `vit` also has a field `type`, whose default is the
    tower's name in config.json.

    Attributes:
        image_size: Height and width of a frame, in pixels.
        patch_size: Height and width of a patch, in pixels.
        width: Width of the blocks; for a model's `vit`, also of the features.
        depth: Number of blocks.
        num_heads: Number of attention heads in a block.
        mlp_dim: Width of the feed-forward layer in a block.
        num_tokens: Number of tokens of a frame in the blocks; for a model's `vit`, also the number of features.
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
    """Config of EVA-CLIP's vision transformer (reference: eva_vit.py)."""

    image_size: int = 224
    patch_size: int = 14
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    norm_eps: float = 1e-6

    @property
    def num_patches(self) -> int:
        """Number of patches of a frame."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a frame: its patches and the class token."""
        return self.num_patches + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageBindVisionConfig(VitConfig):
    """Config of ImageBind's vision tower (reference: ImageBind/models).

    Attributes:
        frames_per_patch: Number of frames in a patch. An image is encoded as this many equal frames.
    """

    frames_per_patch: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """The properties of a tower that are not in its config.

    Attributes:
        module: The tower's network, as "package.module:Class". `Class(config, rngs=rngs)` maps normalized frames
            [b, h, w, 3] to features [b, num_tokens, width]. None for a tower that another module builds.
        mean: Means of red, green and blue for the normalization of frames, for values in [0, 1].
        std: Standard deviations of red, green and blue.
        scanned: Whether the blocks are stacked as `blocks` and run by `lax.scan`, which gathers one block at a time.
        quantized: The linear layers that int8 and int4 quantize, by the path of their parent module.
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
    """Return the entry of `TOWERS` for a tower's config.

    Raises:
        ConfigError: `TOWERS` has no entry for the config class.
    """
    if type(config) not in TOWERS:
        known = ", ".join(cls.__name__ for cls in TOWERS)
        raise ConfigError(f"{type(config).__name__} is not a config of a vision tower; choose one of {known}")
    return TOWERS[type(config)]


def is_scanned(config: Any) -> bool:
    """Return whether the blocks of a config's module are stacked. Only entries of `TOWERS` may set `scanned=False`."""
    return type(config) not in TOWERS or TOWERS[type(config)].scanned


def build_tower(config: TowerConfig, rngs: Any) -> Any:
    """Build the network of a tower that can be a model's `vit`.

    Args:
        config: The tower's config.
        rngs: `nnx.Rngs` for the new weights.

    Returns:
        A module that maps normalized frames [b, h, w, 3] to features [b, num_tokens, width].

    Raises:
        ConfigError: The config is not that of a tower, or another module builds the tower.
    """
    module = get_tower(config).module
    if module is None:
        raise ConfigError(f"vit: {type(config).__name__} belongs to another encoder and cannot be used alone")
    return pkgutil.resolve_name(module)(config, rngs=rngs)


def get_tower_class(fields: Mapping[str, Any], where: str) -> type:
    """Return the config class for a tower's fields in config.json.

    Args:
        fields: The tower's fields. `type` selects the class; without it, the tower is EVA-CLIP's.
        where: The path of the fields, for the error message.

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
            f"{where}.type: unknown vision tower {format_value(name)}; known types: {names} (EVA-CLIP's has no type)"
        )
    return known[name]
