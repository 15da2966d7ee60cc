"""Train the audio tower against the frozen vision tower, as ImageBind's: frames of clips with their audio.

The loss is InfoNCE between the pairs of a batch, without labels or text. No other component is trained on audio.
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
from vllama_jax.miniature.towers import EMBED_DIM, init_tokens, l2_normalize, run_blocks_without_remat
from vllama_jax.nn.imagebind import AudioTower, VisionTower

AUDIO = ImageBindAudioConfig(width=96, depth=2, num_heads=4, mlp_dim=384, log_logit_scale=0.0)  # vectors of norm 1
NUM_KEPT_PATCHES = 76  # of 228, drawn for each batch; the others are dropped, which makes a step cost a third


@dataclasses.dataclass(frozen=True)
class FrameAudioPairs:
    """Frames of clips with the audio around them.

    Attributes:
        frames: uint8 [n, h, w, 3].
        mels: Log-mel spectrograms of the two seconds around each frame, float32 [n, 128, 204].
    """

    frames: np.ndarray
    mels: np.ndarray


class ContrastiveAudioTower(nnx.Module):
    """The audio tower with the trainable temperature of the loss."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.tower = AudioTower(AUDIO, EMBED_DIM, rngs=rngs)
        init_tokens(self.tower, rngs)
        for extra in (self.tower.blocks.attention.extra_key, self.tower.blocks.attention.extra_value):
            extra.set_value(0.02 * jax.random.normal(rngs.params(), extra.shape))
        self.log_scale = nnx.Param(jnp.log(1 / 0.07))


def read_pairs(clips: list[Path]) -> FrameAudioPairs:
    """Read two pairs of each clip: the audio of its first and of its second half, each with a frame of that half."""
    chunks = map_in_processes(_read_chunk, [clips[first : first + 50] for first in range(0, len(clips), 50)])
    frames, mels = (np.concatenate([chunk[i] for chunk in chunks]) for i in (0, 1))
    return FrameAudioPairs(frames, mels)


def _read_chunk(clips: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    frames, mels = [], []
    for clip in clips:
        video = read_video(clip, 4, IMAGE_SIZE)
        assert video.waveform is not None  # these clips have audio
        assert video.sample_rate is not None
        half = video.waveform.shape[1] // 2
        for number in (0, 1):
            frames.append(video.frames[1 + 2 * number])  # the second or the last of four frames
            waveform = video.waveform[:, number * half : (number + 1) * half]
            mels.append(mel_clips(waveform, video.sample_rate, 1)[0])
    return np.stack(frames), np.stack(mels)


def train_audio_tower(
    vision: VisionTower, pairs: FrameAudioPairs, *, steps: int, batch_size: int, seed: int, log: Callable[[str], None]
) -> AudioTower:
    """Train an audio tower whose vectors match those of the frozen vision tower.

    Args:
        vision: The frozen vision tower.
        pairs: Frames with their audio.
        steps: The number of steps.
        batch_size: Pairs in a batch.
        seed: The seed of the weights and of the batches.
        log: Called with progress messages.

    Returns:
        The trained tower.
    """
    encode = jax.jit(lambda vision, frames: vision(frames))
    groups = range(0, len(pairs.frames), 256)
    frame_vectors = np.concatenate([encode(vision, normalize(pairs.frames[first : first + 256])) for first in groups])

    def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        chosen = rng.permutation(len(frame_vectors))[:batch_size]
        patches = np.sort(rng.permutation(AUDIO.num_patches)[:NUM_KEPT_PATCHES])
        return {"vectors": frame_vectors[chosen], "mels": pairs.mels[chosen], "patches": patches}

    def loss(model: ContrastiveAudioTower, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = model.tower.embed_inputs(batch["mels"])
        x = jnp.concatenate([x[:, :1], x[:, 1:][:, batch["patches"]]], axis=1)
        audio_vectors = l2_normalize(model.tower.project_class_token(run_blocks_without_remat(model.tower.blocks, x)))
        logits = jnp.exp(jnp.minimum(model.log_scale[...], jnp.log(100.0))) * audio_vectors @ batch["vectors"].T
        cost = -jnp.mean(jnp.diag(jax.nn.log_softmax(logits, axis=0)) + jnp.diag(jax.nn.log_softmax(logits, axis=1)))
        return cost / 2, {"temperature": jnp.exp(-model.log_scale[...])}

    model = ContrastiveAudioTower(rngs=nnx.Rngs(seed))
    model = fit(model, loss, batch, steps=steps, learning_rate=1e-3, seed=seed, name="audio tower", log=log)
    return model.tower
