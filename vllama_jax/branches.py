"""Branches: networks that make media tokens for the language model. The table `BRANCHES` has an entry for each.

Data, training, memory estimates, feature caches, chat and evaluation read the table. To add a branch, add its config
class and its entry here, its module in `nn/` and its rules in `convert/` (docs/extending.md). Importing this module
imports no jax.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vllama_jax.errors import ConfigError
from vllama_jax.io.json_fields import format_value
from vllama_jax.towers import TowerConfig, is_scanned

if TYPE_CHECKING:
    from vllama_jax.config import QFormerConfig, VideoLlamaConfig

# The array of a batch that has each kind of media: frames [b, t, h, w, 3] or log-mel spectrograms [b, s, f, m].
MEDIA_ARRAYS = {"video": "frames", "image": "frames", "audio": "mel"}
ARRAY_DTYPES = {"frames": "uint8", "mel": "float32"}


class BranchConfig(Protocol):
    """The interface of the configs of additional branches."""

    @property
    def type(self) -> str:
        """The branch's name, which is the default of this field."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """A frozen encoder, which makes features from each frame or each log-mel spectrogram.

    Attributes:
        components: A function from the model's config to the component's config, by the path of the component. The
            tower comes first.
        encode: Function of the network and frames or spectrograms [b, t, …] that returns features
            [b, t, *feature_shape].
    """

    components: Mapping[str, Callable[["VideoLlamaConfig"], Any]]
    encode: Callable[[Any, Any], Any]

    @property
    def tower(self) -> str:
        """The path of the encoder's tower."""
        return next(iter(self.components))

    def is_scanned(self, model: "VideoLlamaConfig") -> bool:
        """Return whether the blocks of the tower are stacked. Those of audio towers always are."""
        return is_scanned(self.tower_config(model))

    def tower_config(self, model: "VideoLlamaConfig") -> Any:
        """Return the tower's config: a `TowerConfig` for frames, an `ImageBindAudioConfig` for spectrograms."""
        return self.components[self.tower](model)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """A frozen encoder, followed by positions, a Q-Former and a projection, which are trained.

    In the types below, a `VideoLlamaConfig` is the config of the model.

    Attributes:
        name: The branch's name in run configs. For an additional branch, also its type in config.json and its
            attribute in the network.
        encoders: The encoders by the array that they encode, "frames" or "mel". Records of other media are rejected.
        prompt_array: The array that the branch encodes in a chat. Its tokens take the placeholders of that media in
            the prompt, after those of branches that precede it in `BRANCHES`.
        feature_shape: Function that returns the shape of the features of one frame or audio clip.
        qformer: The path of the Q-Former.
        positions: The path of the learned positions.
        projection: The path of the projection to the language model's width.
        qformer_config: Function that returns the config of the Q-Former, which makes `num_queries` media tokens.
        tokens: Function (network, features [b, t, *feature_shape], interpolate_positions=…, dropout=…) that returns
            media tokens [b, q, w].
        is_in: Function that returns whether a model has this branch.
        advice: How to get a model with this branch, for error messages.
        without: Function that returns the model's config without this branch; None if every model has the branch.
        config: The config class of an additional branch.
        module: The network of an additional branch, as "package.module:Class". It is built by
            `Class(branch_config, model_config, rngs=rngs)`.
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
        """The paths of the components that are trained by default."""
        return self.qformer, self.positions, self.projection

    @property
    def trainable(self) -> tuple[str, ...]:
        """The components that are trained by default, as fnmatch patterns on parameter paths; `*` also matches `/`."""
        return f"{self.qformer}/*", self.positions, f"{self.projection}/*"

    @property
    def components(self) -> tuple[str, ...]:
        """The paths of all components of the branch."""
        return *(path for encoder in self.encoders.values() for path in encoder.components), *self.trainable_components

    @property
    def media(self) -> tuple[str, ...]:
        """The kinds of media that the branch accepts."""
        return tuple(kind for kind, array in MEDIA_ARRAYS.items() if array in self.encoders)

    @property
    def prompt_media(self) -> tuple[str, ...]:
        """The kinds of media whose placeholders the branch's tokens take in a prompt."""
        return tuple(kind for kind, array in MEDIA_ARRAYS.items() if array == self.prompt_array)

    def encoder(self, kind: str) -> Encoder:
        """Return the encoder of a kind of media that the branch accepts."""
        return self.encoders[MEDIA_ARRAYS[kind]]

    def encoder_components(self, kinds: Iterable[str]) -> tuple[str, ...]:
        """Return the paths of the components that encode these kinds of media; none for kinds that are not accepted."""
        arrays = {MEDIA_ARRAYS[kind] for kind in kinds}
        return tuple(path for array, encoder in self.encoders.items() if array in arrays for path in encoder.components)

    def num_tokens(self, model: "VideoLlamaConfig") -> int:
        """Return the number of media tokens of an example."""
        return self.qformer_config(model).num_queries

    def frame_tower_config(self, model: "VideoLlamaConfig") -> TowerConfig:
        """Return the config of the tower that encodes frames, which determines their size and normalization."""
        return self.encoders["frames"].tower_config(model)

    def media_shape(self, model: "VideoLlamaConfig", kind: str) -> tuple[int, ...]:
        """Return the shape of an example's frames [t, h, w, 3] or log-mel spectrograms [s, f, m]."""
        tower = self.encoder(kind).tower_config(model)
        if kind == "audio":
            return num_media_items(model, kind), tower.num_mel_bins, tower.num_mel_frames
        return num_media_items(model, kind), tower.image_size, tower.image_size, 3

    def example_feature_shape(self, model: "VideoLlamaConfig", kind: str) -> tuple[int, ...]:
        """Return the shape of an example's features: [t, *feature_shape]."""
        return num_media_items(model, kind), *self.feature_shape(model)

    def require(self, model: "VideoLlamaConfig", where: str = "") -> None:
        """Check that a model has this branch.

        Args:
            model: The model's config.
            where: A prefix for the error message, such as the field that requires the branch.

        Raises:
            ConfigError: The model does not have the branch.
        """
        if not self.is_in(model):
            raise ConfigError(f"{where and f'{where}: '}the model has no {self.name} branch; {self.advice}")


def num_media_items(model: "VideoLlamaConfig", kind: str) -> int:
    """Return the number of frames or audio clips of an example of this kind of media."""
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
            "frames": Encoder(  # only for training: ImageBind's towers share one embedding space
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
    """Return the entry of `BRANCHES` with a given name.

    Raises:
        ConfigError: There is none.
    """
    if name not in BRANCHES:
        raise ConfigError(f"branch: {format_value(name)} is unknown; choose one of {', '.join(BRANCHES)}")
    return BRANCHES[name]


def get_branches(model: "VideoLlamaConfig") -> list[Branch]:
    """Return the branches of a model."""
    return [branch for branch in BRANCHES.values() if branch.is_in(model)]


def list_components() -> list[str]:
    """Return the paths of the components of all branches."""
    return [component for branch in BRANCHES.values() for component in branch.components]


def list_trainable_components() -> list[str]:
    """Return the paths of the components that are trained by default. An untrained model may lack them."""
    return [component for branch in BRANCHES.values() for component in branch.trainable_components]


def get_component(path: str) -> str:
    """Return the component that a parameter path belongs to, such as "vit", "imagebind/audio" or "llama"."""
    return next((component for component in list_components() if is_within(path, component)), path.split("/")[0])


def is_within(path: str, component: str) -> bool:
    """Return whether a path is that of a component, or of a parameter in it."""
    return path == component or path.startswith(f"{component}/")


def get_branch_class(fields: Mapping[str, Any], where: str) -> type:
    """Return the config class for an additional branch's fields in config.json, which `type` selects.

    Args:
        fields: The branch's fields.
        where: The path of the fields, for the error message.

    Raises:
        ConfigError: The type is unknown.
    """
    known = {branch.name: branch.config for branch in BRANCHES.values() if branch.config is not None}
    name = fields.get("type")
    if not isinstance(name, str) or name not in known:
        raise ConfigError(
            f"{where}.type: unknown branch {format_value(name)}; known types: {', '.join(known) or 'none'}"
        )
    return known[name]
