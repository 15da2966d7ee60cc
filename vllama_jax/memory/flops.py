"""Count the floating-point operations of a training step from shapes. XLA's count has the body of a loop only once."""

import math

import jax

from vllama_jax.branches import BRANCHES
from vllama_jax.config import LlamaConfig, QFormerConfig, VideoLlamaConfig
from vllama_jax.memory.chips import find_chip


def peak_flops(device: jax.Device) -> float | None:
    """Return the peak number of bfloat16 operations per second of a device; None if it is unknown, as for CPUs."""
    chip = find_chip(device)
    return chip.flops if chip else None


def step_flops(model: VideoLlamaConfig, branch: str, batch: dict, remat_policy: str) -> float:
    """Count the floating-point operations of a training step: the sum of `step_flops_by_component`."""
    return sum(step_flops_by_component(model, branch, batch, remat_policy).values())


def step_flops_by_component(model: VideoLlamaConfig, branch: str, batch: dict, remat_policy: str) -> dict[str, float]:
    """Count the floating-point operations of a training step by component, on all devices together.

    The language model has a forward pass, a second one if its activations are recomputed, and a backward pass for
    activations only, as its weights are frozen. Encoders have a forward pass. The trained Q-Former counts three times.

    Args:
        model: The model's config.
        branch: The name of the trained branch.
        batch: The arrays of a batch (train/step.py); only shapes are used.
        remat_policy: The activation checkpointing policy.

    Returns:
        Operations of the "encoders" (frozen), the trained "qformer", and "llama".
    """
    rows, length = batch["ids"].shape
    targets = batch["positions"].shape[1]
    llama = model.llama
    block = _llama_block(llama) * length + 4 * length * length * llama.num_heads * llama.head_dim
    forward = llama.depth * block
    passes = {"full": 3, "dots": 2, "none": 2}[remat_policy]
    head = 2 * llama.width * llama.vocab_size * targets
    return {
        "encoders": rows * encoder_flops(model, branch, batch),
        "qformer": rows * 3 * qformer_flops(model, branch),
        "llama": rows * (passes * forward + 2 * head),
    }


def forward_flops(llama: LlamaConfig, rows: int, new: int, attended: int) -> float:
    """Operations of the language model on `rows` × `new` tokens that attend to `attended` each, and one row of logits.

    A prefill has `new` = `attended` = the prompt's length, a decoded token `new` = 1.
    """
    block = _llama_block(llama) * new + 4 * new * attended * llama.num_heads * llama.head_dim
    return rows * (llama.depth * block + 2 * llama.width * llama.vocab_size)


def _llama_block(cfg: LlamaConfig) -> float:
    """Count the operations of a block for one token, without the attention scores."""
    heads = 2 * cfg.num_heads + 2 * cfg.num_kv_heads
    return 2 * cfg.width * (heads * cfg.head_dim + 3 * cfg.mlp_dim)


def encoder_flops(model: VideoLlamaConfig, branch: str, batch: dict) -> float:
    """Count the operations of a branch's frozen encoders for one example of a batch; 0 with a feature cache."""
    array = next((array for array in BRANCHES[branch].encoders if array in batch), None)
    if array is None:
        return 0
    tower, *others = [component(model) for component in BRANCHES[branch].encoders[array].components.values()]
    operations = _blocks(tower.width, tower.depth, tower.mlp_dim, tower.num_tokens)
    qformers = [other for other in others if isinstance(other, QFormerConfig)]
    operations += sum(_qformer(qformer, tower.width, tower.num_tokens) for qformer in qformers)
    return batch[array].shape[1] * operations


def _blocks(width: int, depth: int, mlp_dim: int, tokens: int) -> float:
    return depth * (2 * tokens * width * (4 * width + 2 * mlp_dim) + 4 * tokens * tokens * width)


def qformer_flops(model: VideoLlamaConfig, branch: str) -> float:
    """Count the operations of a branch's Q-Former for one example: a video of `model.num_frames`, or audio."""
    entry = BRANCHES[branch]
    *memory, width = entry.example_feature_shape(model, entry.prompt_media[0])
    return _qformer(entry.qformer_config(model), width, math.prod(memory))


def _qformer(cfg: QFormerConfig, memory_width: int, memory: int) -> float:
    """Count the operations of a Q-Former that cross-attends to `memory` tokens."""
    layer = 2 * cfg.num_queries * cfg.width * (4 * cfg.width + 2 * cfg.mlp_dim)
    cross_attention = 2 * cfg.num_queries * cfg.width * 2 * cfg.width + 4 * memory * memory_width * cfg.width
    return cfg.depth * layer + cfg.depth // cfg.cross_attention_every * cross_attention
