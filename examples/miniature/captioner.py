"""Train the image Q-Former on captions, as BLIP-2's: between a frozen vision tower and a frozen language model.

Its linear layer initializes the miniature's `llama_proj`, as MiniGPT-4's does for Video-LLaMA.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vllama_jax.config import QFormerConfig
from vllama_jax.media.image import standardize
from vllama_jax.miniature.fit import fit
from vllama_jax.miniature.images import ImageSet
from vllama_jax.miniature.language import CONFIG as LLAMA
from vllama_jax.miniature.towers import EVA
from vllama_jax.nn.eva_vit import EvaVit
from vllama_jax.nn.layers import layer_norm
from vllama_jax.nn.llama import Llama
from vllama_jax.nn.qformer import QFormer
from vllama_jax.text.prompts import Media
from vllama_jax.text.templates import find_caption_template
from vllama_jax.text.tokenizer import Tokenizer
from vllama_jax.text.training import PLAIN_TEMPLATE, encode_caption

IMAGE_QFORMER = QFormerConfig(width=96, depth=4, num_heads=4, mlp_dim=384, num_queries=8, cross_attention_every=2)
LN_VISION_EPS = 1e-5


class Captioner(nnx.Module):
    """The trainable components: the norm after the tower, the Q-Former, and the projection."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.ln_vision = layer_norm(EVA.width, LN_VISION_EPS, rngs)
        self.image_qformer = QFormer(IMAGE_QFORMER, EVA.width, rngs=rngs)
        self.llama_proj = nnx.Linear(IMAGE_QFORMER.width, LLAMA.width, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Map the tower's output [b, n, width] to media tokens [b, queries, width of the language model]."""
        return self.llama_proj(self.image_qformer(self.ln_vision(features)))


def train_captioner(
    vit: EvaVit,
    llama: Llama,
    images: ImageSet,
    tokenizer: Tokenizer,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    log: Callable[[str], None],
) -> Captioner:
    """Train on image captions with the language model's cross-entropy.

    Args:
        vit: The frozen vision tower.
        llama: The frozen language model.
        images: The training images.
        tokenizer: The language model's tokenizer.
        steps: The number of steps.
        batch_size: Images in a batch.
        seed: The seed of the weights and of the batches.
        log: Called with progress messages.

    Returns:
        The trained components.
    """
    queries = IMAGE_QFORMER.num_queries
    template = find_caption_template(PLAIN_TEMPLATE)
    captions = [
        encode_caption(tokenizer, template, text, Media("image"), None, queries, 32) for text in images.captions
    ]
    length = max(len(caption.ids) for caption in captions)
    ids = np.stack([np.pad(caption.ids, (0, length - len(caption.ids))) for caption in captions])
    labels = np.stack(
        [np.pad(caption.labels, (0, length - len(caption.ids)), constant_values=-100) for caption in captions]
    )
    frozen = nnx.split((vit, llama))

    def batch(rng: np.random.Generator) -> dict[str, np.ndarray | nnx.State]:
        chosen = rng.integers(len(ids), size=batch_size)
        return {
            "pixels": images.pixels[chosen], "ids": ids[chosen], "labels": labels[chosen], "frozen": frozen[1]
        }  # fmt: skip

    def loss(captioner: Captioner, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        vit, llama = nnx.merge(frozen[0], batch["frozen"])
        features = vit(standardize(batch["pixels"].astype(jnp.float32)))
        words = llama.embed(batch["ids"])
        x = jnp.concatenate([words[:, :1], captioner(features), words[:, 1 + queries :]], axis=1)
        logits = llama.logits(llama(x, jnp.ones(x.shape[:2], bool), "none")[:, :-1])
        target = batch["labels"][:, 1:]
        has_label = target >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(target, 0))
        correct = (jnp.argmax(logits, axis=-1) == target) & has_label
        exact = jnp.all(correct | ~has_label, axis=1)
        return jnp.sum(losses * has_label) / jnp.sum(has_label), {"exact captions": jnp.mean(exact)}

    captioner = Captioner(rngs=nnx.Rngs(seed))
    return fit(captioner, loss, batch, steps=steps, learning_rate=2e-3, seed=seed, name="captioner", log=log)
