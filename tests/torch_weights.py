"""PyTorch references of every component with random weights, and the same weights in our modules.

They are converted by the rules of the package. Names of weights in transformers differ from those in the original's
files; the tables here map them.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn
from transformers import Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel, LlamaForCausalLM
from transformers import LlamaConfig as HfLlamaConfig

from vllama_jax.config import (
    ImageBindAudioConfig,
    ImageBindConfig,
    ImageBindVisionConfig,
    LlamaConfig,
    QFormerConfig,
    VideoLlamaConfig,
    VitConfig,
)
from vllama_jax.convert.imagebind import AUDIO_SCALE
from vllama_jax.convert.rules import Rule
from vllama_jax.convert.verify.reference import imagebind, qformer

State = dict[str, torch.Tensor]

# Text in transformers' names → text in the original's names.
EVA_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "self_attn.projection": "attn.proj",
    "self_attn": "attn",
    "layer_norm": "norm",
}
QFORMER_NAMES = {
    "layernorm": "bert.embeddings.LayerNorm",
    "encoder.layer.": "bert.encoder.layer.",
    **qformer.NAMES,
}


def rename(state: Mapping[str, torch.Tensor], table: Mapping[str, str], prefix: str = "") -> State:
    def renamed(name: str) -> str:
        for theirs, original in table.items():
            name = name.replace(theirs, original)
        return prefix + name

    return {renamed(name): tensor for name, tensor in state.items()}


def randomise(module: nn.Module, *, quiet: bool = False, seed: int = 0) -> None:
    """Set every parameter to random values, including norms and biases, at a scale at which each has an effect.

    `quiet` makes all but matrices a thousand times smaller. With small inputs, every norm then has a variance of about
    1e-6, so its epsilon has an effect; with ordinary activations, rounding would hide it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                parameter.normal_(generator=generator)
                is_matrix = name in ("weight", "in_proj_weight") and parameter.ndim > 1
                if is_matrix and not isinstance(part, nn.Embedding):
                    parameter.mul_(parameter[0].numel() ** -0.5)
                    continue
                parameter.mul_(0.3)
                if name == "weight" and parameter.ndim == 1:  # the scale of a norm
                    parameter.add_(1.0)
                if quiet:
                    parameter.mul_(QUIET)


QUIET = 1e-3


def load(make: Callable[[], nnx.Module], rules: Sequence[Rule], state: State, target: str = "") -> nnx.Module:
    """Load torch's weights into our module; `target` is the module's path in the full model.

    Every weight of ours must have one rule, and every tensor must be used once. `state` is emptied, so that large
    blocks are not in memory twice.
    """
    graph, abstract = nnx.split(nnx.eval_shape(make))
    leaves = {"/".join(filter(None, (target, *map(str, path)))): path for path, _ in nnx.to_flat_state(abstract)}
    used = [name for rule in rules for names in rule.names() for name in names]
    _same(leaves, [rule.target for rule in rules], "weights of ours")
    _same(state, used, "tensors of torch's")
    flat = dict(nnx.to_flat_state(abstract))
    for rule in rules:
        path, value = leaves[rule.target], _converted(rule, state)
        assert value.shape == flat[path].shape, f"{rule.target}: {value.shape}, not {flat[path].shape}"
        flat[path] = flat[path].replace(value)
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _converted(rule: Rule, state: State) -> jax.Array:
    rows = [rule.transform.to_jax(*(state.pop(name).numpy() for name in names)) for names in rule.names()]
    if rule.layers is None:
        return jnp.array(rows[0])
    return jnp.array(rows[0][None] if len(rows) == 1 else np.stack(rows))


def _same(there: Mapping[str, object], ruled: Sequence[str], what: str) -> None:
    twice = {name for name in ruled if ruled.count(name) > 1}
    missing, unknown = there.keys() - set(ruled), set(ruled) - there.keys()
    wrong = twice | missing | unknown
    assert not wrong, f"{what}: without a rule {missing}, unknown {unknown}, twice {twice}"


def as_jax(x: torch.Tensor) -> jax.Array:
    """Return arrays [b, …] unchanged and images [b, 3, h, w] with channels last."""
    return jnp.array((x.permute(0, 2, 3, 1) if x.ndim == 4 and x.shape[1] == 3 else x).numpy())


def error(ours: jax.Array, reference: torch.Tensor) -> float:
    """Return max|ours − reference| / max|reference|."""
    ours, reference = np.asarray(ours, np.float32), reference.detach().numpy()
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


class EvaReference(nn.Module):
    """BLIP-2's vision tower without the final norm, which the original lacks."""

    def __init__(self, cfg: VitConfig):
        super().__init__()
        self.model = Blip2VisionModel(
            Blip2VisionConfig(
                hidden_size=cfg.width,
                intermediate_size=cfg.mlp_dim,
                num_hidden_layers=cfg.depth,
                num_attention_heads=cfg.num_heads,
                image_size=cfg.image_size,
                patch_size=cfg.patch_size,
                layer_norm_eps=1e-6,
                attn_implementation="eager",
            )
        )
        del self.model.post_layernorm

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.encoder(self.model.embeddings(images)).last_hidden_state

    def drop_key_biases(self) -> None:
        """Drop the key biases, which the original lacks; transformers keeps zeros for them."""
        with torch.no_grad():
            for layer in self.model.encoder.layers:
                layer.self_attn.qkv.bias.chunk(3)[1].zero_()

    def original_state(self) -> State:
        state = rename(self.model.state_dict(), EVA_NAMES)
        for name in [name for name in state if name.endswith("qkv.bias")]:
            layer = name.removesuffix("qkv.bias")
            state[f"{layer}q_bias"], key, state[f"{layer}v_bias"] = state.pop(name).chunk(3)
            assert not key.any()
        return state


class QFormerReference(nn.Module):
    """BLIP-2's Q-Former with its queries; `name` is "", "video_" or "audio_", as in the original's files."""

    def __init__(self, cfg: QFormerConfig, memory_width: int, name: str = ""):
        super().__init__()
        self.name = name
        self.query_tokens = nn.Parameter(torch.zeros(1, cfg.num_queries, cfg.width))
        self.model = Blip2QFormerModel(qformer.configuration(cfg, memory_width))
        self.model.eval()

    def forward(self, memory: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens.repeat(len(memory), 1, 1)
        return self.model(query_embeds=queries, encoder_hidden_states=memory).last_hidden_state

    def original_state(self) -> State:
        state = rename(self.model.state_dict(), QFORMER_NAMES, prefix=f"{self.name}Qformer.")
        return {f"{self.name}query_tokens": self.query_tokens.detach(), **state}


class ImageBindReference(nn.Module):
    """Both towers; each module of a tower is under its stage, as in the published file."""

    def __init__(self, cfg: ImageBindConfig):
        super().__init__()
        audio, vision = cfg.audio, cfg.vision
        self.modality_preprocessors = nn.ModuleDict(
            {
                "audio": imagebind.Preprocessor(imagebind.AudioStem(audio), audio.num_patches, audio.width),
                "vision": imagebind.Preprocessor(imagebind.VisionStem(vision), vision.num_patches, vision.width),
            }
        )
        self.modality_trunks = nn.ModuleDict(
            {"audio": Trunk(audio, extra_key_value=True), "vision": Trunk(vision, first_norm=True)}
        )
        self.modality_heads = nn.ModuleDict(
            {"audio": imagebind.head(audio.width, cfg.embed_dim), "vision": imagebind.head(vision.width, cfg.embed_dim)}
        )
        self.modality_postprocessors = nn.ModuleDict(
            {
                "audio": nn.Sequential(imagebind.Normalize(), imagebind.Scale(audio.log_logit_scale)),
                "vision": imagebind.Normalize(),
            }
        )

    def forward(self, modality: str, x: torch.Tensor) -> torch.Tensor:
        """Encode mel [b, f, t] or images [b, 3, h, w] to [b, embed_dim]."""
        for stage in (
            self.modality_preprocessors,
            self.modality_trunks,
            self.modality_heads,
            self.modality_postprocessors,
        ):
            x = stage[modality](x)
        return x


class Trunk(nn.Module):
    """Pre-norm transformer blocks without a final norm; the vision trunk has a norm before its first block."""

    def __init__(
        self,
        cfg: ImageBindAudioConfig | ImageBindVisionConfig,
        *,
        extra_key_value: bool = False,
        first_norm: bool = False,
    ):
        super().__init__()
        first = [nn.LayerNorm(cfg.width, eps=1e-6)] if first_norm else []
        self.pre_transformer_layer = nn.Sequential(*first)
        self.blocks = nn.Sequential(*(imagebind.Block(cfg, extra_key_value) for _ in range(cfg.depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.pre_transformer_layer(x))


def imagebind_state(reference: ImageBindReference) -> State:
    state = reference.state_dict()
    del state[AUDIO_SCALE]  # stored in the config
    return state


def llama_reference(cfg: LlamaConfig) -> LlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if scaling := cfg.rope_scaling:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_length,
            }
    return LlamaForCausalLM(
        HfLlamaConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.width,
            intermediate_size=cfg.mlp_dim,
            num_hidden_layers=cfg.depth,
            num_attention_heads=cfg.num_heads,
            num_key_value_heads=cfg.num_kv_heads,
            head_dim=cfg.head_dim,
            rms_norm_eps=cfg.norm_eps,
            max_position_embeddings=cfg.max_length,
            rope_parameters=rope,
            tie_word_embeddings=cfg.tie_embeddings,
            attn_implementation="eager",
        )
    )


def llama_state(reference: LlamaForCausalLM) -> State:
    state = reference.state_dict()
    if reference.config.tie_word_embeddings:
        del state["lm_head.weight"]  # a copy of the embeddings
    return state


class VideoLlamaReference(nn.Module):
    """The two branches and their components (paper §2), for one video or audio file at a time."""

    def __init__(self, cfg: VideoLlamaConfig):
        super().__init__()
        width = cfg.llama.width
        self.visual_encoder = EvaReference(cfg.vit)
        self.ln_vision = nn.LayerNorm(cfg.vit.width, eps=1e-5)
        self.image_qformer = QFormerReference(cfg.image_qformer, cfg.vit.width)
        self.video_frame_position_embedding = nn.Embedding(cfg.num_frame_positions, cfg.image_qformer.width)
        self.video_qformer = QFormerReference(cfg.video_qformer, cfg.image_qformer.width, "video_")
        self.llama_proj = nn.Linear(cfg.video_qformer.width, width)
        self.imagebind = ImageBindReference(cfg.imagebind)
        self.audio_position_embedding = nn.Embedding(cfg.num_clip_positions, cfg.imagebind.embed_dim)
        self.audio_qformer = QFormerReference(cfg.audio_qformer, cfg.imagebind.embed_dim, "audio_")
        self.audio_llama_proj = nn.Linear(cfg.audio_qformer.width, width)
        self.llama = llama_reference(cfg.llama)

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode frames [t, 3, h, w] to [t, 32, d]."""
        return self.image_qformer(self.ln_vision(self.visual_encoder(frames)))

    def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode frames [t, 3, h, w] to [32, w]; a frame's position is added to all of its tokens."""
        features = self.encode_frames(frames)
        positions = self.video_frame_position_embedding(torch.arange(len(frames)))
        memory = torch.cat([tokens + position for tokens, position in zip(features, positions, strict=True)])
        return self.llama_proj(self.video_qformer(memory[None]))[0]

    def encode_senses(self, modality: str, x: torch.Tensor) -> torch.Tensor:
        """Encode "audio", mel [s, f, t], or "vision", frames [t, 3, h, w], to [8, w]."""
        features = self.imagebind(modality, x)
        memory = features + self.audio_position_embedding(torch.arange(len(x)))
        return self.audio_llama_proj(self.audio_qformer(memory[None]))[0]

    def original_state(self) -> State:
        heads = ("ln_vision", "video_frame_position_embedding", "llama_proj")
        heads += ("audio_position_embedding", "audio_llama_proj")
        state = {
            **self.visual_encoder.original_state(),
            **self.image_qformer.original_state(),
            **self.video_qformer.original_state(),
            **self.audio_qformer.original_state(),
            **imagebind_state(self.imagebind),
            **llama_state(self.llama),
        }
        for name in heads:
            state |= rename(getattr(self, name).state_dict(), {}, prefix=f"{name}.")
        return state
