"""Estimate the memory of activations, in bytes on one device, from shapes.

Each estimate is the sum of the arrays that exist at the same time at the peak of a computation. The numbers of arrays
are from reading the layers (nn/); tests/test_memory.py compares the estimates with XLA's. Activations have the compute
dtype, scores and logits float32. Scores are counted in full, although XLA never stores small ones in full on CPUs. A
dimension that the tensor axis of the mesh does not divide is replicated.
"""

import dataclasses
import math

from vllama_jax.branches import BRANCHES
from vllama_jax.config import ImageBindAudioConfig, LlamaConfig, QFormerConfig, VideoLlamaConfig
from vllama_jax.towers import TowerConfig
from vllama_jax.train.config import MeshConfig

FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """The shape of what one device computes at a time.

    Attributes:
        rows: Number of sequences.
        length: Tokens of a sequence.
        itemsize: Size of the compute dtype in bytes.
        mesh: The sizes of the mesh axes.
    """

    rows: int
    length: int
    itemsize: int
    mesh: MeshConfig

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return self.rows * self.length

    def shard_size(self, size: int) -> int:
        """Return the size of a device's shard of a dimension that is sharded over the tensor axis."""
        return size if size % self.mesh.tensor else size // self.mesh.tensor


def estimate_saved_activations(cfg: LlamaConfig, shape: StepShape, remat_policy: str) -> int:
    """Estimate the memory of the activations that all layers save for the backward pass.

    Args:
        cfg: The language model's config.
        shape: The shape of what a device computes.
        remat_policy: The activation checkpointing policy.
    """
    heads, kv_heads = shape.shard_size(cfg.num_heads), shape.shard_size(cfg.num_kv_heads)
    mlp = shape.shard_size(cfg.mlp_dim)
    per_token = cfg.width
    if remat_policy in ("dots", "none"):  # query, key, value, out, gate, up, down
        per_token += (heads + 2 * kv_heads) * cfg.head_dim + 2 * mlp + 2 * cfg.width
    if remat_policy == "none":  # outputs of norms, rotation and gate, and attention weights
        per_token += 4 * cfg.width + (2 + cfg.qk_norm) * (heads + kv_heads) * cfg.head_dim + 3 * mlp
    scores = 2 * _scores(heads, shape.length, shape) if remat_policy == "none" else 0
    return cfg.depth * (shape.tokens * per_token * shape.itemsize + scores)


def estimate_training_layer(cfg: LlamaConfig, shape: StepShape) -> int:
    """Estimate the memory of recomputing and differentiating one layer.

    It has eight arrays of the size of the residual stream. The rest is the larger of two sums: the products of the
    feed-forward layer with their gradients and the attention weights; or queries, keys and values with their gradients
    and three arrays of scores.

    Args:
        cfg: The language model's config.
        shape: The shape of what a device computes.
    """
    heads = shape.shard_size(cfg.num_heads) + 2 * shape.shard_size(cfg.num_kv_heads)
    projected = shape.tokens * heads * cfg.head_dim * shape.itemsize
    products = shape.tokens * shape.shard_size(cfg.mlp_dim) * shape.itemsize
    scores = _scores(shape.shard_size(cfg.num_heads), shape.length, shape)
    stream = shape.tokens * cfg.width * shape.itemsize
    return 8 * stream + projected + max(6 * products + 3 * scores // 2, projected + 3 * scores)


def estimate_prefill_layer(cfg: LlamaConfig, shape: StepShape, capacity: int) -> int:
    """Estimate the memory of one layer in prefill, which attends to the entire KV cache, with a mask.

    A CPU takes less, as it computes the scores in parts.

    Args:
        cfg: The language model's config.
        shape: The shape of what a device computes.
        capacity: Number of positions of the cache.
    """
    heads, kv_heads = shape.shard_size(cfg.num_heads), shape.shard_size(cfg.num_kv_heads)
    attention = shape.tokens * (heads + 2 * kv_heads) * cfg.head_dim * shape.itemsize
    attention += 2 * shape.rows * capacity * kv_heads * cfg.head_dim * shape.itemsize
    attention += 5 * _scores(heads, capacity, shape) // 2
    products = 3 * shape.tokens * shape.shard_size(cfg.mlp_dim) * shape.itemsize
    return 3 * shape.tokens * cfg.width * shape.itemsize + max(attention, products)


def estimate_logits(cfg: LlamaConfig, shape: StepShape, labels: int) -> int:
    """Estimate the memory of the logits at the positions with labels, and of their gradient.

    Args:
        cfg: The language model's config.
        shape: The shape of what a device computes.
        labels: Number of labels of a sequence.
    """
    return 2 * shape.rows * labels * shape.shard_size(cfg.vocab_size) * FLOAT32_BYTES


def estimate_kv_cache(cfg: LlamaConfig, shape: StepShape, capacity: int) -> int:
    """Estimate the memory of the KV cache.

    Args:
        cfg: The language model's config.
        shape: The shape of what a device computes.
        capacity: Number of positions of the cache.
    """
    return cfg.depth * capacity * 2 * shape.shard_size(cfg.num_kv_heads) * shape.rows * cfg.head_dim * shape.itemsize


def estimate_encoder(model: VideoLlamaConfig, branch: str, shape: StepShape) -> int:
    """Estimate the memory of a branch's frozen encoder: the largest of its float32 input, a block and a Q-Former.

    Args:
        model: The model's config.
        branch: The name of the branch.
        shape: The shape of what a device computes; all frames or audio clips are encoded at once.
    """
    kind = BRANCHES[branch].media[0]
    count, *sides = BRANCHES[branch].media_shape(model, kind)
    inputs, encoder = shape.rows * count, BRANCHES[branch].encoder(kind)
    tower, *others = [component(model) for component in encoder.components.values()]
    sizes = [inputs * math.prod(sides) * (FLOAT32_BYTES + shape.itemsize), _tower_block(tower, inputs, shape)]
    qformers = [other for other in others if isinstance(other, QFormerConfig)]
    return max(
        sizes + [estimate_qformer(qformer, inputs, tower.num_tokens, tower.width, shape) for qformer in qformers]
    )


def estimate_trained_qformer(model: VideoLlamaConfig, branch: str, shape: StepShape) -> int:
    """Estimate the memory of a branch's Q-Former in training: twice that of its forward pass.

    Args:
        model: The model's config.
        branch: The name of the branch.
        shape: The shape of what a device computes.
    """
    entry = BRANCHES[branch]
    *memory, width = entry.example_feature_shape(model, entry.media[0])
    return 2 * estimate_qformer(entry.qformer_config(model), shape.rows, math.prod(memory), width, shape)


def estimate_qformer(cfg: QFormerConfig, rows: int, memory: int, memory_width: int, shape: StepShape) -> int:
    """Estimate the memory of a Q-Former's layer with cross-attention.

    Args:
        cfg: The Q-Former's config.
        rows: Number of sequences.
        memory: Number of tokens that it attends to.
        memory_width: Their width.
        shape: The compute dtype and the mesh.
    """
    heads = shape.shard_size(cfg.num_heads)
    width = heads * (cfg.width // cfg.num_heads)
    keys_values = rows * memory * (memory_width + 2 * width) * shape.itemsize
    queries = rows * cfg.num_queries * (4 * cfg.width + 2 * shape.shard_size(cfg.mlp_dim)) * shape.itemsize
    return keys_values + queries + rows * heads * cfg.num_queries * memory * (2 * FLOAT32_BYTES + shape.itemsize)


def _tower_block(cfg: TowerConfig | ImageBindAudioConfig, inputs: int, shape: StepShape) -> int:
    """Estimate a tower's block: the residual stream and its norm, and the larger of attention and feed-forward."""
    tokens = inputs * cfg.num_tokens
    heads = shape.shard_size(cfg.num_heads)
    attention = 3 * tokens * heads * (cfg.width // cfg.num_heads) * shape.itemsize
    attention += inputs * heads * cfg.num_tokens**2 * (2 * FLOAT32_BYTES + shape.itemsize)
    products = 2 * tokens * shape.shard_size(cfg.mlp_dim) * shape.itemsize
    return 2 * tokens * cfg.width * shape.itemsize + max(attention, products)


def _scores(heads: int, attended: int, shape: StepShape) -> int:
    return shape.tokens * heads * attended * FLOAT32_BYTES
