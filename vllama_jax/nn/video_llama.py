"""Video-LLaMA: two branches that turn what is seen and heard into tokens of a language model (arXiv 2306.02858)."""

import pkgutil
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vllama_jax.branches import BRANCHES, Branch
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.nn.arrays import check_array
from vllama_jax.nn.dropout import Dropout
from vllama_jax.nn.imagebind import ImageBind
from vllama_jax.nn.layers import cast_like, layer_norm, learned_positions, position_rows, projection
from vllama_jax.nn.llama import Llama
from vllama_jax.nn.qformer import QFormer
from vllama_jax.towers import build_tower


class VideoLlama(nnx.Module):
    """The network. Frames are normalised floats (media.normalize); every method takes a batch, channels last."""

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
            assert module is not None  # of an additional branch
            setattr(self, extra.type, pkgutil.resolve_name(module)(extra, cfg, rngs=rngs))

    @property
    def branches(self) -> list[Branch]:
        """The branches that this network has: a run leaves out those that it does not use."""
        return [branch for branch in BRANCHES.values() if hasattr(*find_owner(self, branch.qformer))]

    def encode_frames(self, frames: Float[Array, "b t h w 3"]) -> Float[Array, "b t q d"]:
        """Each frame by itself through EVA-CLIP and BLIP-2's Q-Former, before positions: [b, t, 32, 768]."""
        _check_frames(frames, self.cfg.vit.image_size)
        b, t = frames.shape[:2]
        seen = self.ln_vision(self.vit(frames.reshape(b * t, *frames.shape[2:])))
        return self.image_qformer(seen).reshape(b, t, -1, self.image_qformer.queries.shape[-1])

    def video_tokens(
        self,
        features: Float[Array, "b t q d"],
        *,
        interpolate_positions: bool = False,
        dropout: Dropout | None = None,
    ) -> Float[Array, "b v w"]:
        """What `encode_frames` gives → tokens of the language model: positions, video Q-Former, linear layer.

        Raises ConfigError when there are more frames than learned positions and no interpolation is asked for.
        """
        features = self.add_frame_positions(features, interpolate=interpolate_positions)
        return self.llama_proj(self.video_qformer(features, dropout))

    def add_frame_positions(
        self, features: Float[Array, "b t q d"], *, interpolate: bool = False
    ) -> Float[Array, "b t*q d"]:
        """What the video Q-Former reads: all frames' tokens, each with its frame's position."""
        b, t, q, d = features.shape
        rows = position_rows(self.frame_positions, t, interpolate=interpolate, what="frames")
        return (cast_like(features, self.frame_positions) + rows[:, None]).reshape(b, t * q, d)

    def encode_video(
        self, frames: Float[Array, "b t h w 3"], *, interpolate_positions: bool = False
    ) -> Float[Array, "b v w"]:
        """Frames of a video, or one of a picture → [b, 32, width of the language model]."""
        return self.video_tokens(self.encode_frames(frames), interpolate_positions=interpolate_positions)

    def embed_frames(self, frames: Float[Array, "b t h w 3"]) -> Float[Array, "b t e"]:
        """Each frame by itself through ImageBind's vision tower: [b, t, 1024] of norm 1, float32."""
        _check_frames(frames, self.cfg.require_imagebind().vision.image_size)
        b, t = frames.shape[:2]
        return self.imagebind.vision(frames.reshape(b * t, *frames.shape[2:])).reshape(b, t, -1)

    def embed_audio(self, mel: Float[Array, "b s f m"]) -> Float[Array, "b s e"]:
        """Each log-mel picture by itself through ImageBind's audio tower: [b, s, 1024] of norm 20, float32."""
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
        """ImageBind's vectors, of sounds or of pictures → tokens: positions, audio Q-Former, linear layer.

        Raises ConfigError when there are more vectors than learned positions and no interpolation is asked for.
        """
        features = self.add_clip_positions(features, interpolate=interpolate_positions)
        return self.audio_llama_proj(self.audio_qformer(features, dropout))

    def add_clip_positions(
        self, features: Float[Array, "b s e"], *, interpolate: bool = False
    ) -> Float[Array, "b s e"]:
        """What the audio Q-Former reads: a vector for each sound or picture, with its position."""
        count = features.shape[1]
        rows = position_rows(self.audio_positions, count, interpolate=interpolate, what="audio clips or frames")
        return cast_like(features, self.audio_positions) + rows

    def encode_audio(
        self, mel: Float[Array, "b s f m"], *, interpolate_positions: bool = False
    ) -> Float[Array, "b a w"]:
        """Log-mel pictures of clips of sound (media.mel_clips) → [b, 8, width of the language model]."""
        return self.audio_tokens(self.embed_audio(mel), interpolate_positions=interpolate_positions)

    def encode_audio_from_vision(
        self, frames: Float[Array, "b t h w 3"], *, interpolate_positions: bool = False
    ) -> Float[Array, "b a w"]:
        """The audio branch on pictures, as it is trained (paper §2.2.2) → [b, 8, width of the language model]."""
        return self.audio_tokens(self.embed_frames(frames), interpolate_positions=interpolate_positions)

    def embed(self, ids: Int[Array, "b n"]) -> Float[Array, "b n w"]:
        """Embeddings of tokens."""
        check_array("ids", ids, ("b", "n"), "integers", "the tokenizer's `encode` makes [n]")
        return self.llama.embed(ids)

    def __call__(self, embeddings: Float[Array, "b n w"], mask: Bool[Array, "b n"]) -> Float[Array, "b n v"]:
        """Embeddings of text and media, padded on the right → logits, float32. `mask` is True at tokens."""
        check_array("embeddings", embeddings, ("b", "n", "w"), "floats", "`embed` makes them", w=self.cfg.llama.width)
        b, n = embeddings.shape[:2]
        check_array("mask", mask, ("b", "n"), "booleans", "True at tokens", b=b, n=n)
        return self.llama.logits(self.llama(embeddings, mask))


def find_owner(network: VideoLlama, component: str) -> tuple[Any, str]:
    """The module that has a component as an attribute, None where there is none, and the attribute's name."""
    *parents, name = component.split("/")
    owner: Any = network
    for parent in parents:
        owner = getattr(owner, parent, None)
    return owner, name


def _check_frames(frames: Float[Array, "b t h w 3"], size: int) -> None:
    advice = "media.normalize makes such frames [t, h, w, 3] of uint8"
    check_array("frames", frames, ("b", "t", "h", "w", 3), "floats", advice, h=size, w=size)


def splice(
    embeddings: Float[Array, "b n w"], is_media: Bool[Array, "b n"], media: Float[Array, "b m w"]
) -> Float[Array, "b n w"]:
    """Text embeddings with the media tokens, in order, in the places that `is_media` marks."""
    index = jnp.clip(jnp.cumsum(is_media, axis=1) - 1, 0, media.shape[1] - 1)
    chosen = jnp.take_along_axis(media.astype(embeddings.dtype), index[..., None], axis=1)
    return jnp.where(is_media[..., None], chosen, embeddings)
