"""The image Q-Former, trained as BLIP-2's was: between a frozen picture tower and a frozen language model, to caption.

Its linear layer into the language model is what MiniGPT-4's is to Video-LLaMA: where `llama_proj` starts from.
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
    """What is trained: the norm after the tower, the Q-Former, and the layer into the language model."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.ln_vision = layer_norm(EVA.width, LN_VISION_EPS, rngs)
        self.image_qformer = QFormer(IMAGE_QFORMER, EVA.width, rngs=rngs)
        self.llama_proj = nnx.Linear(IMAGE_QFORMER.width, LLAMA.width, rngs=rngs)

    def __call__(self, seen: jax.Array) -> jax.Array:
        """The tower's output [b, n, width] → tokens of the language model [b, queries, width]."""
        return self.llama_proj(self.image_qformer(self.ln_vision(seen)))


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
    """Captions of pictures, by the loss of the language model; it and the tower stay as they are."""
    queries = IMAGE_QFORMER.num_queries
    plain = find_caption_template(PLAIN_TEMPLATE)
    said = [encode_caption(tokenizer, plain, text, Media("image"), None, queries, 32) for text in images.captions]
    length = max(len(one.ids) for one in said)
    ids = np.stack([np.pad(one.ids, (0, length - len(one.ids))) for one in said])
    labels = np.stack([np.pad(one.labels, (0, length - len(one.ids)), constant_values=-100) for one in said])
    frozen = nnx.split((vit, llama))

    def batch(rng: np.random.Generator) -> dict[str, np.ndarray | nnx.State]:
        chosen = rng.integers(len(ids), size=batch_size)
        return {
            "pixels": images.pixels[chosen], "ids": ids[chosen], "labels": labels[chosen], "frozen": frozen[1]
        }  # fmt: skip

    def loss(captioner: Captioner, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        vit, llama = nnx.merge(frozen[0], batch["frozen"])
        seen = vit(standardize(batch["pixels"].astype(jnp.float32)))
        words = llama.embed(batch["ids"])
        x = jnp.concatenate([words[:, :1], captioner(seen), words[:, 1 + queries :]], axis=1)
        logits = llama.logits(llama(x, jnp.ones(x.shape[:2], bool), "none")[:, :-1])
        target = batch["labels"][:, 1:]
        counted = target >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(target, 0))
        right = (jnp.argmax(logits, axis=-1) == target) & counted
        whole = jnp.all(right | ~counted, axis=1)
        return jnp.sum(losses * counted) / jnp.sum(counted), {"whole captions right": jnp.mean(whole)}

    captioner = Captioner(rngs=nnx.Rngs(seed))
    return fit(captioner, loss, batch, steps=steps, learning_rate=2e-3, seed=seed, name="captioner", log=log)
