"""Branches: what turns media into tokens of the language model. One table describes them.

Data, training, memory estimates, features, chat and evaluation read the table. To add a branch: its config class and
its entry here, its module in `nn/`, its rules in `convert/` (docs/architecture.md). Importing this file imports no jax.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vllama_jax.errors import ConfigError
from vllama_jax.io.json_fields import format_value
from vllama_jax.towers import TowerConfig, is_scanned

if TYPE_CHECKING:
    from vllama_jax.config import QFormerConfig, VideoLlamaConfig

# Which array of a batch holds each kind of media: frames [b, t, h, w, 3], log-mel clips [b, s, f, m].
MEDIA_ARRAYS = {"video": "frames", "image": "frames", "audio": "mel"}
ARRAY_DTYPES = {"frames": "uint8", "mel": "float32"}  # of these arrays


class BranchConfig(Protocol):
    """What the config of an additional branch has: a field `type`, whose default is the branch's name."""

    @property
    def type(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """The frozen encoder that makes the features of a branch from frames or from log-mel clips, each by itself.

    Attributes:
        components: The paths of its components, each with a function from the model's config to the component's. The
            tower comes first.
        encode: (network, frames or mel [b, t, …]) → features [b, t, *feature_shape].
    """

    components: Mapping[str, Callable[["VideoLlamaConfig"], Any]]
    encode: Callable[[Any, Any], Any]

    @property
    def tower(self) -> str:
        """The path of its tower."""
        return next(iter(self.components))

    def is_scanned(self, model: "VideoLlamaConfig") -> bool:
        """Whether the blocks of its tower are stacked; those of audio towers are."""
        return is_scanned(self.tower_config(model))

    def tower_config(self, model: "VideoLlamaConfig") -> Any:
        """A TowerConfig for frames, ImageBind's audio config for log-mel clips."""
        return self.components[self.tower](model)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """A frozen encoder, then positions, a Q-Former and a projection, which are trained.

    Attributes:
        name: In run configs; of an additional branch, also its type in config.json and its attribute of the network.
        encoders: By the array that it encodes, "frames" or "mel". Records of other media are refused.
        prompt_array: What a chat gives to it. Its tokens go to the place of that media in the prompt, after those of
            branches that come before it in the table.
        feature_shape: The shape of the features of one frame or clip.
        qformer: The path of its Q-Former.
        positions: The path of its learned positions.
        projection: The path of its projection to the language model's width.
        qformer_config: The config of its Q-Former. It makes `num_queries` media tokens.
        tokens: (network, features [b, t, *feature_shape], interpolate_positions=…, dropout=…) → media tokens [b, q, w].
        is_in: Whether a model has this branch.
        advice: What to do for a model that does not.
        without: The model's config without this branch; None where no model is without it.
        config: The config class of an additional branch.
        module: Where the network of an additional branch is, as "package.module:Class";
            Class(branch config, model config, rngs=rngs).
    """

    name: str
    encoders: Mapping[str, Encoder]
    prompt_array: Literal["frames", "mel"]
    feature_shape: Callable[["VideoLlamaConfig"], tuple[int, ...]]
    qformer: str
    positions: str
    projection: str
    qformer_config: Callable[["VideoLlamaConfig"], "QFormerConfig"]
    tokens: Callable[..., Any]
    is_in: Callable[["VideoLlamaConfig"], bool] = lambda model: True
    advice: str = ""
    without: Callable[["VideoLlamaConfig"], "VideoLlamaConfig"] | None = None
    config: type | None = None
    module: str | None = None

    @property
    def trainable_components(self) -> tuple[str, ...]:
        """The paths of the components that training changes by default."""
        return self.qformer, self.positions, self.projection

    @property
    def trainable(self) -> tuple[str, ...]:
        """The same as patterns on parameter paths (fnmatch; * crosses /)."""
        return f"{self.qformer}/*", self.positions, f"{self.projection}/*"

    @property
    def components(self) -> tuple[str, ...]:
        """The paths of all its components."""
        return *(path for encoder in self.encoders.values() for path in encoder.components), *self.trainable_components

    @property
    def media(self) -> tuple[str, ...]:
        """The kinds of media that it accepts."""
        return tuple(kind for kind, array in MEDIA_ARRAYS.items() if array in self.encoders)

    @property
    def prompt_media(self) -> tuple[str, ...]:
        """The kinds of media whose places in a prompt its tokens take."""
        return tuple(kind for kind, array in MEDIA_ARRAYS.items() if array == self.prompt_array)

    def encoder(self, kind: str) -> Encoder:
        """The encoder of a kind of media that it accepts."""
        return self.encoders[MEDIA_ARRAYS[kind]]

    def encoder_components(self, kinds: Iterable[str]) -> tuple[str, ...]:
        """The paths of the components that encode these kinds of media, those of them that it accepts."""
        used = {MEDIA_ARRAYS[kind] for kind in kinds}
        return tuple(path for array, one in self.encoders.items() if array in used for path in one.components)

    def num_tokens(self, model: "VideoLlamaConfig") -> int:
        """The number of media tokens that a sample becomes."""
        return self.qformer_config(model).num_queries

    def frame_tower_config(self, model: "VideoLlamaConfig") -> TowerConfig:
        """The config of the tower that encodes frames: their size, mean and standard deviation."""
        return self.encoders["frames"].tower_config(model)

    def media_shape(self, model: "VideoLlamaConfig", kind: str) -> tuple[int, ...]:
        """The shape of a sample's frames, [t, h, w, 3], or log-mel clips, [s, f, m]."""
        tower = self.encoder(kind).tower_config(model)
        if kind == "audio":
            return num_media_items(model, kind), tower.num_mel_bins, tower.num_mel_frames
        return num_media_items(model, kind), tower.image_size, tower.image_size, 3

    def example_feature_shape(self, model: "VideoLlamaConfig", kind: str) -> tuple[int, ...]:
        """The shape of a sample's features."""
        return num_media_items(model, kind), *self.feature_shape(model)

    def require(self, model: "VideoLlamaConfig", where: str = "") -> None:
        """Raise ConfigError, which starts with `where`, unless a model has this branch."""
        if not self.is_in(model):
            raise ConfigError(f"{where and f'{where}: '}the model has no {self.name} branch; {self.advice}")


def num_media_items(model: "VideoLlamaConfig", kind: str) -> int:
    """How many frames or clips a sample of this kind of media has."""
    return {"video": model.num_frames, "image": 1, "audio": model.num_clips}[kind]


def _without_audio(model: "VideoLlamaConfig") -> "VideoLlamaConfig":
    return dataclasses.replace(model, audio_qformer=None, imagebind=None)


BRANCHES: dict[str, Branch] = {
    "vision": Branch(
        name="vision",
        encoders={
            "frames": Encoder(
                components={
                    "vit": lambda model: model.vit,
                    "ln_vision": lambda model: model.ln_vision_eps,
                    "image_qformer": lambda model: model.image_qformer,
                },
                encode=lambda network, frames: network.encode_frames(frames),
            )
        },
        prompt_array="frames",
        feature_shape=lambda model: (model.image_qformer.num_queries, model.image_qformer.width),
        qformer="video_qformer",
        positions="frame_positions",
        projection="llama_proj",
        qformer_config=lambda model: model.video_qformer,
        tokens=lambda network, features, **options: network.video_tokens(features, **options),
    ),
    "audio": Branch(
        name="audio",
        encoders={
            "frames": Encoder(  # for training alone: ImageBind aligns what both of its towers give
                components={"imagebind/vision": lambda model: model.require_imagebind().vision},
                encode=lambda network, frames: network.embed_frames(frames),
            ),
            "mel": Encoder(
                components={"imagebind/audio": lambda model: model.require_imagebind().audio},
                encode=lambda network, mel: network.embed_audio(mel),
            ),
        },
        prompt_array="mel",
        feature_shape=lambda model: (model.require_imagebind().embed_dim,),
        qformer="audio_qformer",
        positions="audio_positions",
        projection="audio_llama_proj",
        qformer_config=lambda model: model.require_audio_qformer(),
        tokens=lambda network, features, **options: network.audio_tokens(features, **options),
        is_in=lambda model: model.has_audio,
        advice="convert it with --imagebind",
        without=_without_audio,
    ),
}


def find_branch(name: str) -> Branch:
    """The branch of that name. Raises ConfigError for an unknown one."""
    if name not in BRANCHES:
        raise ConfigError(f"branch: {format_value(name)} is unknown; choose one of {', '.join(BRANCHES)}")
    return BRANCHES[name]


def get_branches(model: "VideoLlamaConfig") -> list[Branch]:
    """The branches that a model has."""
    return [branch for branch in BRANCHES.values() if branch.is_in(model)]


def list_components() -> list[str]:
    """The paths of the components of all branches."""
    return [component for branch in BRANCHES.values() for component in branch.components]


def list_trainable_components() -> list[str]:
    """Those that training changes by default, which a model may lack before it is trained."""
    return [component for branch in BRANCHES.values() for component in branch.trainable_components]


def get_component(path: str) -> str:
    """The component that a parameter belongs to: "vit", "imagebind/audio", "llama"."""
    return next((component for component in list_components() if is_within(path, component)), path.split("/")[0])


def is_within(path: str, component: str) -> bool:
    """Whether a path is that of a component or of a part of it."""
    return path == component or path.startswith(f"{component}/")


def get_branch_class(fields: Mapping[str, Any], where: str) -> type:
    """The config class of an additional branch's fields in config.json, by `type`. Raises ConfigError."""
    known = {branch.name: branch.config for branch in BRANCHES.values() if branch.config is not None}
    name = fields.get("type")
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{where}.type: unknown branch {format_value(name)}; known are {', '.join(known) or 'none'}")
    return known[name]
