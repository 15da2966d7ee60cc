"""The network of Video-LLaMA: branches that make media tokens, and a language model (arXiv 2306.02858)."""

import pkgutil
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vllama_jax.branches import BRANCHES, Branch, list_components
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.nn.arrays import check_array
from vllama_jax.nn.dropout import Dropout
from vllama_jax.nn.imagebind import ImageBind
from vllama_jax.nn.layers import cast_like, layer_norm, learned_positions, position_rows, projection
from vllama_jax.nn.llama import Llama
from vllama_jax.nn.qformer import QFormer
from vllama_jax.towers import build_tower


class VideoLlama(nnx.Module):
    """The network of Video-LLaMA.

    All methods take batches. Frames are normalized floats (`media.normalize`) with channels last.

    Args:
        cfg: The config.
        rngs: Random keys for the new weights.
    """

    def __init__(self, cfg: VideoLlamaConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.vit = build_tower(cfg.vit, rngs)
        self.ln_vision = layer_norm(cfg.vit.width, cfg.ln_vision_eps, rngs)
        self.image_qformer = QFormer(cfg.image_qformer, cfg.vit.width, rngs=rngs)
        self.video_qformer = QFormer(cfg.video_qformer, cfg.image_qformer.width, rngs=rngs)
        self.frame_positions = learned_positions(cfg.num_frame_positions, cfg.image_qformer.width, rngs)
        self.llama_proj = projection(cfg.video_qformer.width, cfg.llama.width, rngs)
        if cfg.imagebind is not None and cfg.audio_qformer is not None:
            self.imagebind = ImageBind(cfg.imagebind, rngs=rngs)
            self.audio_qformer = QFormer(cfg.audio_qformer, cfg.imagebind.embed_dim, rngs=rngs)
            self.audio_positions = learned_positions(cfg.num_clip_positions, cfg.imagebind.embed_dim, rngs)
            self.audio_llama_proj = projection(cfg.audio_qformer.width, cfg.llama.width, rngs)
        self.llama = Llama(cfg.llama, rngs=rngs)
        for extra in cfg.extra_branches:
            module = BRANCHES[extra.type].module
            assert module is not None  # additional branches have a module
            setattr(self, extra.type, pkgutil.resolve_name(module)(extra, cfg, rngs=rngs))

    @property
    def branches(self) -> list[Branch]:
        """The branches of the network. Training removes those that a run does not use."""
        return [branch for branch in BRANCHES.values() if hasattr(*find_owner(self, branch.qformer))]

    def encode_frames(self, frames: Float[Array, "b t h w 3"]) -> Float[Array, "b t q d"]:
        """Encode each frame with the vision encoder and the image Q-Former.

        Args:
            frames: Normalized frames.

        Returns:
            Features without positions, [b, t, 32, 768] for the published models.

        Raises:
            ArrayError: `frames` has another shape or dtype.
        """
        _check_frames(frames, self.cfg.vit.image_size)
        b, t = frames.shape[:2]
        patches = self.ln_vision(self.vit(frames.reshape(b * t, *frames.shape[2:])))
        return self.image_qformer(patches).reshape(b, t, -1, self.image_qformer.queries.shape[-1])

    def video_tokens(
        self,
        features: Float[Array, "b t q d"],
        *,
        interpolate_positions: bool = False,
        dropout: Dropout | None = None,
    ) -> Float[Array, "b v w"]:
        """Make media tokens from the features of frames: add positions, run the video Q-Former and project.

        Args:
            features: Features from `encode_frames`.
            interpolate_positions: Interpolate the learned positions for more frames than there are positions.
            dropout: Dropout in the Q-Former, for training.

        Returns:
            Media tokens [b, 32, width of the language model].

        Raises:
            ConfigError: There are more frames than learned positions, and `interpolate_positions` is false.
        """
        features = self.add_frame_positions(features, interpolate=interpolate_positions)
        return self.llama_proj(self.video_qformer(features, dropout))

    def add_frame_positions(
        self, features: Float[Array, "b t q d"], *, interpolate: bool = False
    ) -> Float[Array, "b t*q d"]:
        """Add frame positions to features, and concatenate the tokens of all frames for the video Q-Former."""
        b, t, q, d = features.shape
        rows = position_rows(self.frame_positions, t, interpolate=interpolate, what="frames")
        return (cast_like(features, self.frame_positions) + rows[:, None]).reshape(b, t * q, d)

    def encode_video(
        self, frames: Float[Array, "b t h w 3"], *, interpolate_positions: bool = False
    ) -> Float[Array, "b v w"]:
        """Encode the frames of videos, or one frame of images, to media tokens [b, 32, width of the language model].

        Args:
            frames: Normalized frames.
            interpolate_positions: Interpolate the learned positions for more frames than there are positions.

        Raises:
            ArrayError: `frames` has another shape or dtype.
            ConfigError: There are more frames than learned positions, and `interpolate_positions` is false.
        """
        return self.video_tokens(self.encode_frames(frames), interpolate_positions=interpolate_positions)

    def embed_frames(self, frames: Float[Array, "b t h w 3"]) -> Float[Array, "b t e"]:
        """Embed each frame with ImageBind's vision tower.

        Args:
            frames: Normalized frames.

        Returns:
            float32 embeddings of norm 1, [b, t, 1024] for the published models.

        Raises:
            ArrayError: `frames` has another shape or dtype.
            ConfigError: The model has no audio branch.
        """
        _check_frames(frames, self.cfg.require_imagebind().vision.image_size)
        b, t = frames.shape[:2]
        return self.imagebind.vision(frames.reshape(b * t, *frames.shape[2:])).reshape(b, t, -1)

    def embed_audio(self, mel: Float[Array, "b s f m"]) -> Float[Array, "b s e"]:
        """Embed each log-mel spectrogram with ImageBind's audio tower.

        Args:
            mel: Normalized log-mel spectrograms of audio clips (`media.mel_clips`).

        Returns:
            float32 embeddings of norm 20, [b, s, 1024] for the published models.

        Raises:
            ArrayError: `mel` has another shape or dtype.
            ConfigError: The model has no audio branch.
        """
        cfg = self.cfg.require_imagebind().audio
        advice = "media.mel_clips makes [s, f, m] of a waveform"
        check_array("mel", mel, ("b", "s", "f", "m"), "floats", advice, f=cfg.num_mel_bins, m=cfg.num_mel_frames)
        b, s = mel.shape[:2]
        return self.imagebind.audio(mel.reshape(b * s, *mel.shape[2:])).reshape(b, s, -1)

    def audio_tokens(
        self,
        features: Float[Array, "b s e"],
        *,
        interpolate_positions: bool = False,
        dropout: Dropout | None = None,
    ) -> Float[Array, "b a w"]:
        """Make media tokens from ImageBind's embeddings: add positions, run the audio Q-Former and project.

        Args:
            features: Embeddings from `embed_audio`, or from `embed_frames` in training.
            interpolate_positions: Interpolate the learned positions for more embeddings than there are positions.
            dropout: Dropout in the Q-Former, for training.

        Returns:
            Media tokens [b, 8, width of the language model].

        Raises:
            ConfigError: There are more embeddings than learned positions, and `interpolate_positions` is false.
        """
        features = self.add_clip_positions(features, interpolate=interpolate_positions)
        return self.audio_llama_proj(self.audio_qformer(features, dropout))

    def add_clip_positions(
        self, features: Float[Array, "b s e"], *, interpolate: bool = False
    ) -> Float[Array, "b s e"]:
        """Add audio positions to the embeddings of audio clips or frames, for the audio Q-Former."""
        count = features.shape[1]
        rows = position_rows(self.audio_positions, count, interpolate=interpolate, what="audio clips or frames")
        return cast_like(features, self.audio_positions) + rows

    def encode_audio(
        self, mel: Float[Array, "b s f m"], *, interpolate_positions: bool = False
    ) -> Float[Array, "b a w"]:
        """Encode audio to media tokens [b, 8, width of the language model].

        Args:
            mel: Normalized log-mel spectrograms of audio clips (`media.mel_clips`).
            interpolate_positions: Interpolate the learned positions for more clips than there are positions.

        Raises:
            ArrayError: `mel` has another shape or dtype.
            ConfigError: The model has no audio branch, or there are more clips than learned positions and
                `interpolate_positions` is false.
        """
        return self.audio_tokens(self.embed_audio(mel), interpolate_positions=interpolate_positions)

    def encode_audio_from_vision(
        self, frames: Float[Array, "b t h w 3"], *, interpolate_positions: bool = False
    ) -> Float[Array, "b a w"]:
        """Encode frames with the audio branch, as in its training (paper §2.2.2).

        Args:
            frames: Normalized frames.
            interpolate_positions: Interpolate the learned positions for more frames than there are positions.

        Returns:
            Media tokens [b, 8, width of the language model].

        Raises:
            ArrayError: `frames` has another shape or dtype.
            ConfigError: The model has no audio branch, or there are more frames than learned positions and
                `interpolate_positions` is false.
        """
        return self.audio_tokens(self.embed_frames(frames), interpolate_positions=interpolate_positions)

    def embed(self, ids: Int[Array, "b n"]) -> Float[Array, "b n w"]:
        """Return the embeddings of token ids. Raises ArrayError for another shape or dtype."""
        check_array("ids", ids, ("b", "n"), "integers", "the tokenizer's `encode` makes [n]")
        return self.llama.embed(ids)

    def __call__(self, embeddings: Float[Array, "b n w"], mask: Bool[Array, "b n"]) -> Float[Array, "b n v"]:
        """Run the language model.

        Args:
            embeddings: Embeddings of text and media, padded on the right.
            mask: True at tokens, False at padding.

        Returns:
            float32 logits.

        Raises:
            ArrayError: An argument has another shape or dtype.
        """
        check_array("embeddings", embeddings, ("b", "n", "w"), "floats", "`embed` makes them", w=self.cfg.llama.width)
        b, n = embeddings.shape[:2]
        check_array("mask", mask, ("b", "n"), "booleans", "True at tokens", b=b, n=n)
        return self.llama.logits(self.llama(embeddings, mask))


def find_owner(network: VideoLlama, component: str) -> tuple[Any, str]:
    """Return the module that has a component as an attribute, or None, and the name of the attribute."""
    *parents, name = component.split("/")
    owner: Any = network
    for parent in parents:
        owner = getattr(owner, parent, None)
    return owner, name


def keep_components(network: VideoLlama, used: Collection[str]) -> None:
    """Remove all components except `used` from a network.

    Args:
        network: The network, which is changed.
        used: The paths of the components to keep.
    """
    unused = {"llama", *list_components()} - {*used}
    unused |= {path.split("/")[0] for path in unused} - {path.split("/")[0] for path in used}
    for path in sorted(unused):  # a module before its components
        owner, name = find_owner(network, path)
        if hasattr(owner, name):
            delattr(owner, name)


def _check_frames(frames: Float[Array, "b t h w 3"], size: int) -> None:
    advice = "media.normalize makes such frames [t, h, w, 3] of uint8"
    check_array("frames", frames, ("b", "t", "h", "w", 3), "floats", advice, h=size, w=size)


def splice(
    embeddings: Float[Array, "b n w"], is_media: Bool[Array, "b n"], media: Float[Array, "b m w"]
) -> Float[Array, "b n w"]:
    """Replace the embeddings of placeholders by media tokens.

    Args:
        embeddings: Token embeddings.
        is_media: True at placeholders.
        media: The media tokens, in the order of the placeholders. Tokens past the last placeholder are ignored.
    """
    index = jnp.clip(jnp.cumsum(is_media, axis=1) - 1, 0, media.shape[1] - 1)
    tokens = jnp.take_along_axis(media.astype(embeddings.dtype), index[..., None], axis=1)
    return jnp.where(is_media[..., None], tokens, embeddings)
