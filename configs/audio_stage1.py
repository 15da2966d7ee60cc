"""Stage 1 of the audio branch: captions of WebVid and LLaVA-CC3M, with frames encoded by ImageBind (paper §2.2.2)."""

from vllama_jax.train.config import AUDIO_BRANCH, DatasetConfig, OptimConfig, TextConfig, TrainConfig

config = TrainConfig(
    model="model",
    branch="audio",
    trainable=AUDIO_BRANCH,
    datasets=(
        DatasetConfig(path="data/webvid", ratio=100, frame_sampling="head_tail", text=TextConfig(clean=True)),
        DatasetConfig(path="data/llava_cc3m", ratio=24),
    ),
    steps=25_000,  # 5 epochs of 5000
    batch_size=256,  # 32 on each of 8 GPUs
    optim=OptimConfig(lr=1e-4, min_lr=8e-5, warmup_steps=5000),
)
