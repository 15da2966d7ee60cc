"""The models that the scripts compare at: full widths with few layers for two CPU cores, full size for a GPU."""

import dataclasses
from collections.abc import Mapping, Sequence

from vllama_jax.config import LLAMA_7B, LlamaConfig, VideoLlamaConfig, tiny, video_llama_7b

LLAMA = dataclasses.replace(LLAMA_7B, width=2048, depth=8, num_heads=16, num_kv_heads=16, mlp_dim=5504, vocab_size=8000)


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        model: The model.
        wide: The language model whose prefill is measured.
        prefill: Lengths of the prompts of the prefill.
        prompts: Lengths of the prompts that decoding continues.
        batches: Batch sizes of decoding; of the last one, only at the first length.
        frames: Numbers of frames that are encoded at a time.
        videos: Number of files that `vllama generate` answers, by model.
        seconds: Length of each.
        compiles: Whether PyTorch is also measured with torch.compile.
        product: Width of the large matrix product whose rate is the floor.
    """

    model: VideoLlamaConfig
    wide: LlamaConfig
    prefill: Sequence[int] = (128, 512, 2048)
    prompts: Sequence[int] = (60, 500, 1000, 2000)
    batches: Sequence[int] = (1, 8, 32)
    frames: Sequence[int] = (1, 8)
    videos: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"model": 100})
    seconds: int = 10
    compiles: bool = True
    product: int = 4096


def _reduce_depth(model: VideoLlamaConfig, llama: LlamaConfig) -> VideoLlamaConfig:
    return dataclasses.replace(
        model,
        vit=dataclasses.replace(model.vit, depth=4),
        image_qformer=dataclasses.replace(model.image_qformer, depth=2),
        imagebind=dataclasses.replace(
            model.require_imagebind(), vision=dataclasses.replace(model.require_imagebind().vision, depth=1)
        ),
        llama=llama,
    )


SIZES = {
    "tiny": Size(
        model=tiny(vocab_size=704),
        wide=tiny().llama,
        prefill=(20,),
        prompts=(20,),
        batches=(1, 2),
        frames=(1,),
        videos={"model": 2},
        seconds=1,
        compiles=False,
        product=256,
    ),
    "medium": Size(
        model=_reduce_depth(video_llama_7b(), dataclasses.replace(LLAMA, max_length=4096)),
        wide=dataclasses.replace(LLAMA_7B, depth=2, max_length=4096),
        videos={"miniature": 100, "model": 8},
    ),
    "full": Size(model=video_llama_7b("llama_2"), wide=video_llama_7b("llama_2").llama),
}
