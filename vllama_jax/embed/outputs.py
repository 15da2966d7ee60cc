"""The arrays that `embed_files` computes: what each contains, and which components of the network it needs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from vllama_jax.branches import BRANCHES, Branch, get_branches
from vllama_jax.config import VideoLlamaConfig, get_frame_format
from vllama_jax.errors import ConfigError

Feature = Literal["frames", "qformer", "tokens", "imagebind"]
FEATURES: tuple[Feature, ...] = get_args(Feature)

# The names and features of the outputs of encoders, by branch and input.
_ENCODER_OUTPUTS: dict[tuple[str, str], tuple[str, Feature]] = {
    ("vision", "frames"): ("frames", "frames"),
    ("audio", "frames"): ("imagebind_image", "imagebind"),
    ("audio", "mel"): ("imagebind_audio", "imagebind"),
}

# The output of a branch's Q-Former from the features of its encoder, before the projection to media tokens.
_QFORMERS: dict[str, Callable[[Any, Any], Any]] = {
    "vision": lambda network, features: network.video_qformer(network.add_frame_positions(features)),
    "audio": lambda network, features: network.audio_qformer(network.add_clip_positions(features)),
}


@dataclasses.dataclass(frozen=True)
class Output:
    """An array that is computed for each file.

    Attributes:
        name: Its name in `FileFeatures.arrays`.
        feature: The value of `EmbedOptions.features` that selects it.
        branch: The branch whose components compute it.
        array: The input of the branch's encoder, "frames" or "mel".
        row_shape: The shape of a row.
        stage: "encoder" has a row for each frame or audio clip, "qformer" and "tokens" have one for each file.
    """

    name: str
    feature: Feature
    branch: str
    array: str
    row_shape: tuple[int, ...]
    stage: Literal["encoder", "qformer", "tokens"]

    @property
    def components(self) -> set[str]:
        """The paths of the components that compute it."""
        branch = BRANCHES[self.branch]
        encoder = set(branch.encoders[self.array].components)
        return encoder if self.stage == "encoder" else encoder | set(branch.trainable_components)

    def compute(self, network: Any, features: Any) -> Any:
        """Return rows [b, *row_shape] from the encoder's features [b, t, …]; not for the stage "encoder"."""
        if self.stage == "qformer":
            return _QFORMERS[self.branch](network, features)
        return BRANCHES[self.branch].tokens(network, features)


def select_outputs(config: VideoLlamaConfig, features: Sequence[Feature]) -> list[Output]:
    """Return the outputs of a model that `features` select.

    Args:
        config: The model's config.
        features: The features; if there are none, all that the model has.

    Raises:
        ConfigError: The model does not have one of the features, or there is no such feature.
    """
    outputs = _list_outputs(config)
    if unknown := [feature for feature in features if feature not in FEATURES]:
        raise ConfigError(f"features: {unknown[0]!r} is not one of {', '.join(FEATURES)}")
    available = {output.feature for output in outputs}
    if missing := [feature for feature in features if feature not in available]:
        raise ConfigError(f"features: the model has no {missing[0]}; choose from {', '.join(sorted(available))}")
    return [output for output in outputs if output.feature in (features or available)]


def _list_outputs(config: VideoLlamaConfig) -> list[Output]:
    """List all outputs of a model."""
    outputs = []
    for branch in get_branches(config):
        for array in branch.encoders:
            if (branch.name, array) in _ENCODER_OUTPUTS and _can_encode(branch, array, config):
                name, feature = _ENCODER_OUTPUTS[branch.name, array]
                shape = branch.feature_shape(config)
                outputs.append(Output(name, feature, branch.name, array, shape, "encoder"))
        qformer, array = branch.qformer_config(config), branch.prompt_array
        if branch.name in _QFORMERS:
            shape = qformer.num_queries, qformer.width
            outputs.append(Output(branch.qformer, "qformer", branch.name, array, shape, "qformer"))
        name = "video_tokens" if branch.name == "vision" else f"{branch.name}_tokens"
        shape = qformer.num_queries, config.llama.width
        outputs.append(Output(name, "tokens", branch.name, array, shape, "tokens"))
    return outputs


def _can_encode(branch: Branch, array: str, config: VideoLlamaConfig) -> bool:
    """Return whether an encoder takes the frames of `prepare_media`, whose size and normalization are the ViT's."""
    return array != "frames" or get_frame_format(branch.frame_tower_config(config)) == get_frame_format(config.vit)
