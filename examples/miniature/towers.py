"""The two picture towers, EVA-CLIP's and ImageBind's, trained as CLIP is: pictures beside what is said of them.

What is said are short captions, each of one aspect: "a bell", "something red", "at the top". Of each aspect a picture
must find its caption among those of the batch, and a caption its pictures; the same words are the same caption.
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
    """A caption's tokens, averaged, through two layers → [c, EMBED_DIM] of norm 1. The miniature's text tower."""

    def __init__(self, vocab_size: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(vocab_size, PHRASE_WIDTH, rngs=rngs)
        self.up = nnx.Linear(PHRASE_WIDTH, PHRASE_WIDTH, rngs=rngs)
        self.down = nnx.Linear(PHRASE_WIDTH, EMBED_DIM, rngs=rngs)

    def __call__(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        mask = (jnp.arange(ids.shape[1]) < lengths[:, None])[..., None]
        mean = jnp.sum(self.embedding(ids) * mask, axis=1) / lengths[:, None]
        return unit(self.down(jax.nn.gelu(self.up(mean))))


class Towers(nnx.Module):
    """Both picture towers and the text tower. EVA's own head is only needed here."""

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
        """Normalised pictures [b, h, w, 3] → both towers' vectors [b, EMBED_DIM] of norm 1."""
        seen = run(self.eva.blocks, self.eva.embed_inputs(images))[:, 0]
        other = run(self.imagebind.blocks, self.imagebind.embed_inputs(images))
        return unit(self.eva_head(self.eva_norm(seen))), self.imagebind.project_class_token(other)


def init_tokens(tower: EvaVit | VisionTower | AudioTower, rngs: nnx.Rngs) -> None:
    """Random positions and class token, for a tower that starts from nothing."""
    for weight in (tower.positions, tower.class_token):
        weight.set_value(0.02 * jax.random.normal(rngs.params(), weight.shape))


def run(blocks: nnx.Module, x: jax.Array) -> jax.Array:
    """Blocks as the network runs them, but with all that the backward pass needs kept: the batch is small."""
    return run_stack(blocks, x, lambda block, x: block(x), "none")


def unit(x: jax.Array) -> jax.Array:
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
    """Both towers on the same batches, in one program."""
    numbers = phrase_ids(images)
    table = tokenize_phrases(tokenizer)

    def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        chosen = rng.integers(len(numbers), size=batch_size)
        return {"pixels": images.pixels[chosen], "phrases": numbers[chosen]}

    def loss(towers: Towers, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        seen = towers(standardize(batch["pixels"].astype(jnp.float32)))
        figures: dict[str, jax.Array] = {}
        total = jnp.zeros(())
        for aspect, (name, (ids, lengths)) in enumerate(table.items()):
            said = towers.phrases(jnp.asarray(ids), jnp.asarray(lengths))
            for tower, vectors in enumerate(seen):
                logits = jnp.exp(towers.log_scale[tower, aspect]) * vectors @ said.T
                cost, right = contrastive_loss(logits, batch["phrases"][:, aspect])
                total += cost
                if name == "kind":
                    figures["eva's kinds" if tower == 0 else "imagebind's kinds"] = right
        return total / (2 * len(table)), figures

    towers = Towers(tokenizer.vocab_size, rngs=nnx.Rngs(seed))
    return fit(towers, loss, batch, steps=steps, learning_rate=1.5e-3, seed=seed, name="picture towers", log=log)


def contrastive_loss(logits: jax.Array, phrases: jax.Array) -> tuple[jax.Array, jax.Array]:
    """CLIP's loss in both directions, of pictures [b] and the captions [c] of one aspect; and how often it is right.

    phrases: each picture's caption, NOTHING where it has none. Only captions that occur in the batch take part.
    """
    counted = phrases != NO_PHRASE
    positive = (phrases[:, None] == jnp.arange(logits.shape[1])) & counted[:, None]
    present = jnp.any(positive, axis=0)
    to_caption = jax.nn.log_softmax(jnp.where(present, logits, -1e9), axis=1)
    to_picture = jax.nn.log_softmax(jnp.where(counted[:, None], logits, -1e9), axis=0)
    own = jnp.take_along_axis(to_caption, jnp.maximum(phrases, 0)[:, None], axis=1)[:, 0]
    images = -jnp.sum(own * counted) / jnp.maximum(jnp.sum(counted), 1)
    shares = jnp.sum(jnp.where(positive, to_picture, 0), axis=0) / jnp.maximum(jnp.sum(positive, axis=0), 1)
    chance = jnp.log(jnp.maximum(jnp.sum(positive, axis=0), 1))  # of several right pictures each can have a share only
    captions = -jnp.sum(jnp.where(present, shares + chance, 0)) / jnp.maximum(jnp.sum(present), 1)
    right = jnp.sum((jnp.argmax(to_caption, axis=1) == phrases) & counted) / jnp.maximum(jnp.sum(counted), 1)
    return (images + captions) / 2, right


def tokenize_phrases(tokenizer: Tokenizer) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The token ids of each aspect's captions, padded, and how many each has."""
    table = {}
    for aspect, said in phrases().items():
        ids = [tokenizer.encode(text, special=False) for text in said]
        lengths = np.array([len(one) for one in ids], np.int32)
        table[aspect] = np.stack([np.pad(one, (0, lengths.max() - len(one))) for one in ids]).astype(np.int32), lengths
    return table


def measure_phrase_accuracy(towers: Towers, images: ImageSet, tokenizer: Tokenizer) -> dict[str, tuple[float, float]]:
    """For each aspect, the part of pictures that find their caption, by EVA's tower and by ImageBind's."""
    numbers, table = phrase_ids(images), tokenize_phrases(tokenizer)

    vectors = jax.jit(lambda towers, pixels: towers(pixels))
    seen = [vectors(towers, normalize(images.pixels[first : first + 250])) for first in range(0, len(numbers), 250)]
    found = {}
    for aspect, (name, (ids, lengths)) in enumerate(table.items()):
        said = towers.phrases(jnp.asarray(ids), jnp.asarray(lengths))
        counted = numbers[:, aspect] != NO_PHRASE
        guesses = [np.concatenate([np.argmax(one[tower] @ said.T, axis=1) for one in seen]) for tower in (0, 1)]
        eva, imagebind = (float((guess == numbers[:, aspect])[counted].mean()) for guess in guesses)
        found[name] = eva, imagebind
    return found
