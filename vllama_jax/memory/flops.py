"""What a step costs: floating-point operations by hand, since XLA counts the body of a loop once."""

import math

import jax

from vllama_jax.branches import BRANCHES
from vllama_jax.config import LlamaConfig, QFormerConfig, VideoLlamaConfig

# Dense bfloat16 operations a second, from the makers' data sheets, by what JAX calls the device.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Operations a second that a device can do at most; None where it is not known (a CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device.device_kind.startswith(name)), None)


def step_flops(model: VideoLlamaConfig, branch: str, batch: dict, remat_policy: str) -> float:
    """Operations of one step on a batch of arrays (train/step.py), on all devices together.

    The language model runs forward, once more where its activations are not kept, and backward as far as activations
    go: its weights have no gradient. Encoders run forward only. The Q-Former that learns is counted threefold.
    """
    rows, length = batch["ids"].shape
    targets = batch["positions"].shape[1]
    llama = model.llama
    block = _llama_block(llama) * length + 4 * length * length * llama.num_heads * llama.head_dim
    forward = llama.depth * block
    passes = {"full": 3, "dots": 2, "none": 2}[remat_policy]
    head = 2 * llama.width * llama.vocab_size * targets
    return rows * (passes * forward + 2 * head + 3 * _qformer(model, branch) + _encoders(model, branch, batch))


def forward_flops(llama: LlamaConfig, rows: int, new: int, attended: int) -> float:
    """Operations of the language model on `rows` × `new` tokens that attend to `attended` each, and one row of logits.

    A prefill has `new` = `attended` = the prompt's length, a decoded token `new` = 1.
    """
    block = _llama_block(llama) * new + 4 * new * attended * llama.num_heads * llama.head_dim
    return rows * (llama.depth * block + 2 * llama.width * llama.vocab_size)


def _llama_block(cfg: LlamaConfig) -> float:
    """For one token, attention's scores left out."""
    heads = 2 * cfg.num_heads + 2 * cfg.num_kv_heads
    return 2 * cfg.width * (heads * cfg.head_dim + 3 * cfg.mlp_dim)


def _encoders(model: VideoLlamaConfig, branch: str, batch: dict) -> float:
    """For one sample: none where features are read."""
    array = next((array for array in BRANCHES[branch].encoders if array in batch), None)
    if array is None:
        return 0
    tower, *others = [component(model) for component in BRANCHES[branch].encoders[array].components.values()]
    one = _blocks(tower.width, tower.depth, tower.mlp_dim, tower.num_tokens)
    readers = [other for other in others if isinstance(other, QFormerConfig)]
    one += sum(_qformer_reading(reader, tower.width, tower.num_tokens) for reader in readers)
    return batch[array].shape[1] * one


def _blocks(width: int, depth: int, mlp_dim: int, tokens: int) -> float:
    return depth * (2 * tokens * width * (4 * width + 2 * mlp_dim) + 4 * tokens * tokens * width)


def _qformer(model: VideoLlamaConfig, branch: str) -> float:
    """Of the Q-Former that learns, for one sample."""
    described = BRANCHES[branch]
    *memory, width = described.example_feature_shape(model, described.prompt_media[0])
    return _qformer_reading(described.qformer_config(model), width, math.prod(memory))


def _qformer_reading(cfg: QFormerConfig, memory_width: int, memory: int) -> float:
    own = 2 * cfg.num_queries * cfg.width * (4 * cfg.width + 2 * cfg.mlp_dim)
    reads = 2 * cfg.num_queries * cfg.width * 2 * cfg.width + 4 * memory * memory_width * cfg.width
    return cfg.depth * own + cfg.depth // cfg.cross_attention_every * reads
