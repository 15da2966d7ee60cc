"""The audio tower, fitted to the frozen picture tower as ImageBind was: clips' frames beside their sounds.

Plain InfoNCE between the instances of a batch, with no labels and no words. The only place where sound is trained on.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vllama_jax.config import ImageBindAudioConfig
from vllama_jax.media import mel_clips, normalize, read_video
from vllama_jax.miniature.fit import fit
from vllama_jax.miniature.images import IMAGE_SIZE, map_in_processes
from vllama_jax.miniature.towers import EMBED_DIM, init_tokens, run, unit
from vllama_jax.nn.imagebind import AudioTower, VisionTower

AUDIO = ImageBindAudioConfig(width=96, depth=2, num_heads=4, mlp_dim=384, log_logit_scale=0.0)  # a scale of 1
NUM_KEPT_PATCHES = 76  # of 228, drawn at random for each batch: a third of the work


@dataclasses.dataclass(frozen=True)
class FrameAudioPairs:
    """Moments of clips: frames uint8 [n, h, w, 3], and mel float32 [n, 128, 204] of the two seconds around each."""

    frames: np.ndarray
    mels: np.ndarray


class ContrastiveAudioTower(nnx.Module):
    """The audio tower and the temperature that is learned beside it."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.tower = AudioTower(AUDIO, EMBED_DIM, rngs=rngs)
        init_tokens(self.tower, rngs)
        for extra in (self.tower.blocks.attention.extra_key, self.tower.blocks.attention.extra_value):
            extra.set_value(0.02 * jax.random.normal(rngs.params(), extra.shape))
        self.log_scale = nnx.Param(jnp.log(1 / 0.07))


def read_pairs(clips: list[Path]) -> FrameAudioPairs:
    """Two moments of each clip that has sound: its first half and its second, each with a frame from its middle."""
    parts = map_in_processes(_read_part, [clips[first : first + 50] for first in range(0, len(clips), 50)])
    frames, mels = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    return FrameAudioPairs(frames, mels)


def _read_part(clips: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    frames, mels = [], []
    for clip in clips:
        video = read_video(clip, 4, IMAGE_SIZE)
        assert video.waveform is not None  # these clips have sound
        assert video.sample_rate is not None
        half = video.waveform.shape[1] // 2
        for number in (0, 1):
            frames.append(video.frames[1 + 2 * number])  # the second and the last of four frames
            heard = video.waveform[:, number * half : (number + 1) * half]
            mels.append(mel_clips(heard, video.sample_rate, 1)[0])
    return np.stack(frames), np.stack(mels)


def train_audio_tower(
    vision: VisionTower, pairs: FrameAudioPairs, *, steps: int, batch_size: int, seed: int, log: Callable[[str], None]
) -> AudioTower:
    """The audio tower whose vectors fall beside the frozen picture tower's."""
    see = jax.jit(lambda vision, frames: vision(frames))
    groups = range(0, len(pairs.frames), 256)
    seen = np.concatenate([see(vision, normalize(pairs.frames[first : first + 256])) for first in groups])

    def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        chosen = rng.permutation(len(seen))[:batch_size]
        patches = np.sort(rng.permutation(AUDIO.num_patches)[:NUM_KEPT_PATCHES])
        return {"seen": seen[chosen], "mels": pairs.mels[chosen], "patches": patches}

    def loss(hearing: ContrastiveAudioTower, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = hearing.tower.embed_inputs(batch["mels"])
        x = jnp.concatenate([x[:, :1], x[:, 1:][:, batch["patches"]]], axis=1)
        heard = unit(hearing.tower.project_class_token(run(hearing.tower.blocks, x)))
        logits = jnp.exp(jnp.minimum(hearing.log_scale[...], jnp.log(100.0))) * heard @ batch["seen"].T
        cost = -jnp.mean(jnp.diag(jax.nn.log_softmax(logits, axis=0)) + jnp.diag(jax.nn.log_softmax(logits, axis=1)))
        return cost / 2, {"temperature": jnp.exp(-hearing.log_scale[...])}

    hearing = ContrastiveAudioTower(rngs=nnx.Rngs(seed))
    hearing = fit(hearing, loss, batch, steps=steps, learning_rate=1e-3, seed=seed, name="hearing", log=log)
    return hearing.tower
