"""Encoding of images and audio, compared with the classes of transformers of the same sizes.

    python benchmarks/encoders.py [--size medium] [--rounds 3]

The floor of an encoder is the FLOPs of its matrix products at the rate of one large matrix product.
"""

from typing import Any

import jax
import numpy as np
import torch_models
from flax import nnx
from random_weights import make_random_module
from sizes import SIZES, Size
from timing import compare, measure_product_rate, parse_arguments, write_results

from vllama_jax.nn.eva_vit import EvaVit
from vllama_jax.nn.imagebind import AudioTower
from vllama_jax.nn.video_llama import VideoLlama, keep_components


def count_tower_flops(tokens: int, width: int, mlp_dim: int, depth: int) -> float:
    """Count the FLOPs of the matrix products of a tower: projections, attention and MLPs."""
    return 2.0 * depth * tokens * (4 * width**2 + 2 * tokens * width + 2 * width * mlp_dim)


def measure_images(size: Size, rounds: int) -> list[dict[str, Any]]:
    """Measure the ViT, and the complete vision branch, for each number of frames."""
    model, rate, rows = size.model, measure_product_rate(size.product), []
    pixels = model.vit.image_size
    vit = make_random_module(lambda: EvaVit(model.vit, rngs=nnx.Rngs(0)))
    branch = make_random_module(lambda: VideoLlama(model, rngs=nnx.Rngs(0)))
    keep_components(branch, ["vit", "ln_vision", "image_qformer", "video_qformer", "frame_positions", "llama_proj"])
    theirs, their_vit = torch_models.VideoEncoder(model), torch_models.make_vit(model.vit)
    flops = count_tower_flops(model.vit.num_tokens, model.vit.width, model.vit.mlp_dim, model.vit.depth)

    def run_their_vit(x: Any) -> Any:
        return their_vit(x).last_hidden_state

    run, encode = jax.jit(lambda vit, x: vit(x)), jax.jit(lambda branch, x: branch.encode_video(x[None]))
    for count in size.frames:
        frames = np.random.default_rng(0).standard_normal((count, pixels, pixels, 3), np.float32)
        x, theirs_x = jax.numpy.asarray(frames), torch_models.to_torch(frames.transpose(0, 3, 1, 2))
        others = torch_models.eager_and_compiled(run_their_vit, theirs_x, compiles=size.compiles)
        name = f"{count} frame{'s' * (count > 1)}"
        rows.append(compare(f"ViT, {name}", lambda x=x: run(vit, x), others, rounds, floor=count * flops / rate))
        others = torch_models.eager_and_compiled(theirs, theirs_x, compiles=size.compiles)
        rows.append(compare(f"vision branch, {name}", lambda x=x: encode(branch, x), others, rounds))
    return rows


def measure_audio(size: Size, rounds: int) -> list[dict[str, Any]]:
    """Measure ImageBind's audio tower with the clips of one file."""
    imagebind = size.model.require_imagebind()
    cfg, clips = imagebind.audio, size.model.num_clips
    tower = make_random_module(lambda: AudioTower(cfg, imagebind.embed_dim, rngs=nnx.Rngs(0)))
    theirs = torch_models.make_audio_tower(cfg)
    mel = np.random.default_rng(0).standard_normal((clips, cfg.num_mel_bins, cfg.num_mel_frames), np.float32)
    others = torch_models.eager_and_compiled(
        lambda x: theirs(x).pooler_output, torch_models.to_torch(mel.transpose(0, 2, 1)), compiles=size.compiles
    )
    run, x = jax.jit(lambda tower, x: tower(x)), jax.numpy.asarray(mel)
    floor = (
        clips
        * count_tower_flops(cfg.num_tokens, cfg.width, cfg.mlp_dim, cfg.depth)
        / measure_product_rate(size.product)
    )
    return [compare(f"ImageBind audio, {clips} clips", lambda: run(tower, x), others, rounds, floor=floor)]


def main() -> None:
    """Measure all encoders and write the results."""
    options = parse_arguments(__doc__)
    size = SIZES[options.size]
    rows = measure_images(size, options.rounds) + measure_audio(size, options.rounds)
    write_results(options.out, "encoders", rows, size=options.size)


if __name__ == "__main__":
    main()
