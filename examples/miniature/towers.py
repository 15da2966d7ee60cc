"""Train both vision towers, EVA-CLIP's and ImageBind's, as CLIP is: images against phrases.

Each phrase describes one aspect of an image: "a bell", "something red", "at the top". The contrastive loss of an aspect
matches images with the phrases that occur in the batch. Several images may have the same phrase.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vllama_jax.media import normalize
from vllama_jax.media.image import standardize
from vllama_jax.miniature.fit import fit
from vllama_jax.miniature.images import ASPECTS, IMAGE_SIZE, NO_PHRASE, ImageSet, phrase_ids, phrases
from vllama_jax.nn.eva_vit import EvaVit
from vllama_jax.nn.imagebind import AudioTower, VisionTower
from vllama_jax.nn.layers import layer_norm, run_stack
from vllama_jax.text.tokenizer import Tokenizer
from vllama_jax.towers import ImageBindVisionConfig, VitConfig

EMBED_DIM = 64
EVA = VitConfig(image_size=IMAGE_SIZE, patch_size=8, width=96, depth=3, num_heads=4, mlp_dim=384)
IMAGEBIND_VISION = ImageBindVisionConfig(**dataclasses.asdict(EVA))
PHRASE_WIDTH = 128


class TextTower(nnx.Module):
    """The text tower: two layers on the mean of the token embeddings of a phrase."""

    def __init__(self, vocab_size: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(vocab_size, PHRASE_WIDTH, rngs=rngs)
        self.up = nnx.Linear(PHRASE_WIDTH, PHRASE_WIDTH, rngs=rngs)
        self.down = nnx.Linear(PHRASE_WIDTH, EMBED_DIM, rngs=rngs)

    def __call__(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        """Embed phrases: token ids [c, n] and their lengths [c] → vectors [c, EMBED_DIM] of norm 1."""
        mask = (jnp.arange(ids.shape[1]) < lengths[:, None])[..., None]
        mean = jnp.sum(self.embedding(ids) * mask, axis=1) / lengths[:, None]
        return l2_normalize(self.down(jax.nn.gelu(self.up(mean))))


class Towers(nnx.Module):
    """Both vision towers and the text tower. EVA's head is needed for training only."""

    def __init__(self, vocab_size: int, *, rngs: nnx.Rngs):
        self.eva = EvaVit(EVA, rngs=rngs)
        self.eva_norm = layer_norm(EVA.width, EVA.norm_eps, rngs)
        self.eva_head = nnx.Linear(EVA.width, EMBED_DIM, use_bias=False, rngs=rngs)
        self.imagebind = VisionTower(IMAGEBIND_VISION, EMBED_DIM, rngs=rngs)
        self.phrases = TextTower(vocab_size, rngs=rngs)
        self.log_scale = nnx.Param(jnp.full((2, len(ASPECTS)), jnp.log(10.0)))
        init_tokens(self.eva, rngs)
        init_tokens(self.imagebind, rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embed normalized images [b, h, w, 3] with both towers: two arrays [b, EMBED_DIM] of norm 1."""
        eva = run_blocks_without_remat(self.eva.blocks, self.eva.embed_inputs(images))[:, 0]
        imagebind = run_blocks_without_remat(self.imagebind.blocks, self.imagebind.embed_inputs(images))
        return l2_normalize(self.eva_head(self.eva_norm(eva))), self.imagebind.project_class_token(imagebind)


def init_tokens(tower: EvaVit | VisionTower | AudioTower, rngs: nnx.Rngs) -> None:
    """Initialize the positions and the class token of a tower with N(0, 0.02²)."""
    for weight in (tower.positions, tower.class_token):
        weight.set_value(0.02 * jax.random.normal(rngs.params(), weight.shape))


def run_blocks_without_remat(blocks: nnx.Module, x: jax.Array) -> jax.Array:
    """Run stacked blocks and store all activations for the backward pass, as the batches are small."""
    return run_stack(blocks, x, lambda block, x: block(x), "none")


def l2_normalize(x: jax.Array) -> jax.Array:
    """Scale vectors [..., d] to norm 1."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def train_towers(
    images: ImageSet,
    tokenizer: Tokenizer,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    log: Callable[[str], None],
) -> Towers:
    """Train both vision towers on the same batches, in one compiled program.

    Args:
        images: The training images.
        tokenizer: The tokenizer of the phrases.
        steps: The number of steps.
        batch_size: Images in a batch.
        seed: The seed of the weights and of the batches.
        log: Called with progress messages.

    Returns:
        The trained towers.
    """
    labels = phrase_ids(images)
    tokens = tokenize_phrases(tokenizer)

    def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        chosen = rng.integers(len(labels), size=batch_size)
        return {"pixels": images.pixels[chosen], "phrases": labels[chosen]}

    def loss(towers: Towers, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        vectors_by_tower = towers(standardize(batch["pixels"].astype(jnp.float32)))
        metrics: dict[str, jax.Array] = {}
        total = jnp.zeros(())
        for aspect, (name, (ids, lengths)) in enumerate(tokens.items()):
            phrase_vectors = towers.phrases(jnp.asarray(ids), jnp.asarray(lengths))
            for tower, vectors in enumerate(vectors_by_tower):
                logits = jnp.exp(towers.log_scale[tower, aspect]) * vectors @ phrase_vectors.T
                cost, accuracy = contrastive_loss(logits, batch["phrases"][:, aspect])
                total += cost
                if name == "kind":
                    metrics["EVA kind accuracy" if tower == 0 else "ImageBind kind accuracy"] = accuracy
        return total / (2 * len(tokens)), metrics

    towers = Towers(tokenizer.vocab_size, rngs=nnx.Rngs(seed))
    return fit(towers, loss, batch, steps=steps, learning_rate=1.5e-3, seed=seed, name="vision towers", log=log)


def contrastive_loss(logits: jax.Array, phrases: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute CLIP's loss in both directions for one aspect, between b images and its c phrases.

    Args:
        logits: Scaled similarities of images and phrases, float32 [b, c].
        phrases: The phrase of each image, int32 [b]; NO_PHRASE where the aspect is undefined.

    Returns:
        The loss, over the phrases that occur in the batch, and the accuracy of image → phrase; both scalars.
    """
    has_phrase = phrases != NO_PHRASE
    positive = (phrases[:, None] == jnp.arange(logits.shape[1])) & has_phrase[:, None]
    present = jnp.any(positive, axis=0)
    to_phrase = jax.nn.log_softmax(jnp.where(present, logits, -1e9), axis=1)
    to_image = jax.nn.log_softmax(jnp.where(has_phrase[:, None], logits, -1e9), axis=0)
    own = jnp.take_along_axis(to_phrase, jnp.maximum(phrases, 0)[:, None], axis=1)[:, 0]
    image_loss = -jnp.sum(own * has_phrase) / jnp.maximum(jnp.sum(has_phrase), 1)
    shares = jnp.sum(jnp.where(positive, to_image, 0), axis=0) / jnp.maximum(jnp.sum(positive, axis=0), 1)
    minimum = jnp.log(jnp.maximum(jnp.sum(positive, axis=0), 1))  # the loss of k positive images is at least log(k)
    phrase_loss = -jnp.sum(jnp.where(present, shares + minimum, 0)) / jnp.maximum(jnp.sum(present), 1)
    accuracy = jnp.sum((jnp.argmax(to_phrase, axis=1) == phrases) & has_phrase) / jnp.maximum(jnp.sum(has_phrase), 1)
    return (image_loss + phrase_loss) / 2, accuracy


def tokenize_phrases(tokenizer: Tokenizer) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the padded token ids, int32 [c, n], and the lengths, int32 [c], of each aspect's phrases."""
    tokens = {}
    for aspect, aspect_phrases in phrases().items():
        ids = [tokenizer.encode(text, special=False) for text in aspect_phrases]
        lengths = np.array([len(row) for row in ids], np.int32)
        tokens[aspect] = np.stack([np.pad(row, (0, lengths.max() - len(row))) for row in ids]).astype(np.int32), lengths
    return tokens


def measure_phrase_accuracy(towers: Towers, images: ImageSet, tokenizer: Tokenizer) -> dict[str, tuple[float, float]]:
    """Return the zero-shot accuracy of each aspect: for EVA's tower and for ImageBind's."""
    labels, tokens = phrase_ids(images), tokenize_phrases(tokenizer)

    encode = jax.jit(lambda towers, pixels: towers(pixels))
    batches = [encode(towers, normalize(images.pixels[first : first + 250])) for first in range(0, len(labels), 250)]
    accuracies = {}
    for aspect, (name, (ids, lengths)) in enumerate(tokens.items()):
        phrase_vectors = towers.phrases(jnp.asarray(ids), jnp.asarray(lengths))
        has_phrase = labels[:, aspect] != NO_PHRASE
        predictions = [
            np.concatenate([np.argmax(vectors[tower] @ phrase_vectors.T, axis=1) for vectors in batches])
            for tower in (0, 1)
        ]
        eva, imagebind = (float((one == labels[:, aspect])[has_phrase].mean()) for one in predictions)
        accuracies[name] = eva, imagebind
    return accuracies
