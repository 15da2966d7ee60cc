"""What a program holds while it runs, in bytes on one device, by arithmetic: activations, not weights.

Each figure is a sum over the arrays that live together where a program needs most: counts of them are from reading the
layers (nn/), and are held against XLA's own figures in tests/test_memory.py. `itemsize` is of the compute dtype; scores
and logits are float32, and whole (XLA's code for CPUs never holds small scores whole). A dimension that the mesh's
tensor axis does not divide is whole on each device.
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
    """What one device computes at a time: `rows` samples of `length` tokens, in numbers of `itemsize` bytes."""

    rows: int
    length: int
    itemsize: int
    mesh: MeshConfig

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def shard_size(self, size: int) -> int:
        """A device's part of a dimension that goes over the tensor axis."""
        return size if size % self.mesh.tensor else size // self.mesh.tensor


def estimate_saved_activations(cfg: LlamaConfig, shape: StepShape, remat_policy: str) -> int:
    """What the forward pass keeps of every layer for the backward pass (TrainConfig.remat_policy)."""
    heads, kv_heads, mlp = (
        shape.shard_size(cfg.num_heads),
        shape.shard_size(cfg.num_kv_heads),
        shape.shard_size(cfg.mlp_dim),
    )
    a_token = cfg.width
    if remat_policy in ("dots", "none"):  # query, key, value, out, gate, up, down
        a_token += (heads + 2 * kv_heads) * cfg.head_dim + 2 * mlp + 2 * cfg.width
    if remat_policy == "none":  # what norms, rotation and the gate make, and attention's weights
        a_token += 4 * cfg.width + (2 + cfg.qk_norm) * (heads + kv_heads) * cfg.head_dim + 3 * mlp
    scores = 2 * _scores(heads, shape.length, shape) if remat_policy == "none" else 0
    return cfg.depth * (shape.tokens * a_token * shape.itemsize + scores)


def estimate_training_layer(cfg: LlamaConfig, shape: StepShape) -> int:
    """One layer, computed again and differentiated.

    Eight arrays of the residual stream's size; then the feed-forward's products with their gradients beside attention's
    weights, or queries, keys and values with theirs beside three of scores.
    """
    heads = shape.shard_size(cfg.num_heads) + 2 * shape.shard_size(cfg.num_kv_heads)
    projected = shape.tokens * heads * cfg.head_dim * shape.itemsize
    products = shape.tokens * shape.shard_size(cfg.mlp_dim) * shape.itemsize
    scores = _scores(shape.shard_size(cfg.num_heads), shape.length, shape)
    stream = shape.tokens * cfg.width * shape.itemsize
    return 8 * stream + projected + max(6 * products + 3 * scores // 2, projected + 3 * scores)


def estimate_prefill_layer(cfg: LlamaConfig, shape: StepShape, capacity: int) -> int:
    """One layer of a prompt that is read into a cache of `capacity`: all of the cache is attended to, masked."""
    heads, kv_heads = shape.shard_size(cfg.num_heads), shape.shard_size(cfg.num_kv_heads)
    attention = shape.tokens * (heads + 2 * kv_heads) * cfg.head_dim * shape.itemsize
    attention += 2 * shape.rows * capacity * kv_heads * cfg.head_dim * shape.itemsize
    attention += 5 * _scores(heads, capacity, shape) // 2
    products = 3 * shape.tokens * shape.shard_size(cfg.mlp_dim) * shape.itemsize
    return 3 * shape.tokens * cfg.width * shape.itemsize + max(attention, products)


def logits(cfg: LlamaConfig, shape: StepShape, labels: int) -> int:
    """Scores over the vocabulary at the places that have a label, with their gradient."""
    return 2 * shape.rows * labels * shape.shard_size(cfg.vocab_size) * FLOAT32_BYTES


def estimate_kv_cache(cfg: LlamaConfig, shape: StepShape, capacity: int) -> int:
    """generate.py's cache of `capacity` positions."""
    return cfg.depth * capacity * 2 * shape.shard_size(cfg.num_kv_heads) * shape.rows * cfg.head_dim * shape.itemsize


def encoder(model: VideoLlamaConfig, branch: str, shape: StepShape) -> int:
    """The frozen encoder of all frames or clips at once: its input in float32, a block, or a Q-Former after them."""
    kind = BRANCHES[branch].media[0]
    count, *sides = BRANCHES[branch].media_shape(model, kind)
    inputs, one = shape.rows * count, BRANCHES[branch].encoder(kind)
    tower, *others = [component(model) for component in one.components.values()]
    needs = [inputs * math.prod(sides) * (FLOAT32_BYTES + shape.itemsize), _tower_block(tower, inputs, shape)]
    readers = [other for other in others if isinstance(other, QFormerConfig)]
    return max(needs + [qformer(reader, inputs, tower.num_tokens, tower.width, shape) for reader in readers])


def estimate_trained_qformer(model: VideoLlamaConfig, branch: str, shape: StepShape) -> int:
    """The Q-Former that learns, with its gradients: twice what it takes forward, and what it reads."""
    described = BRANCHES[branch]
    *memory, width = described.example_feature_shape(model, described.media[0])
    return 2 * qformer(described.qformer_config(model), shape.rows, math.prod(memory), width, shape)


def qformer(cfg: QFormerConfig, rows: int, memory: int, memory_width: int, shape: StepShape) -> int:
    """A Q-Former's layer that reads `memory` tokens."""
    heads = shape.shard_size(cfg.num_heads)
    width = heads * (cfg.width // cfg.num_heads)
    read = rows * memory * (memory_width + 2 * width) * shape.itemsize
    own = rows * cfg.num_queries * (4 * cfg.width + 2 * shape.shard_size(cfg.mlp_dim)) * shape.itemsize
    return read + own + rows * heads * cfg.num_queries * memory * (2 * FLOAT32_BYTES + shape.itemsize)


def _tower_block(cfg: TowerConfig | ImageBindAudioConfig, inputs: int, shape: StepShape) -> int:
    """One block: the stream and its norm, then query, key, value and scores, or the feed-forward."""
    tokens = inputs * cfg.num_tokens
    heads = shape.shard_size(cfg.num_heads)
    attention = 3 * tokens * heads * (cfg.width // cfg.num_heads) * shape.itemsize
    attention += inputs * heads * cfg.num_tokens**2 * (2 * FLOAT32_BYTES + shape.itemsize)
    products = 2 * tokens * shape.shard_size(cfg.mlp_dim) * shape.itemsize
    return 2 * tokens * cfg.width * shape.itemsize + max(attention, products)


def _scores(heads: int, attended: int, shape: StepShape) -> int:
    return shape.tokens * heads * attended * FLOAT32_BYTES
