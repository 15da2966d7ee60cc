"""Stage 1 of the vision branch: captions of WebVid's videos and LLaVA-CC3M's images (paper §2.2.1)."""

from vllama_jax.train.config import VISION_BRANCH, DatasetConfig, OptimConfig, TextConfig, TrainConfig

config = TrainConfig(
    model="model",
    branch="vision",
    trainable=VISION_BRANCH,
    datasets=(
        DatasetConfig(path="data/webvid", ratio=100, frame_sampling="head_tail", text=TextConfig(clean=True)),
        DatasetConfig(path="data/llava_cc3m", ratio=24),
    ),
    steps=12_500,  # 5 epochs of 2500
    batch_size=256,  # 32 on each of 8 GPUs
    optim=OptimConfig(lr=1e-4, min_lr=8e-5, warmup_steps=2500),
)
