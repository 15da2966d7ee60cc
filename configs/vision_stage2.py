"""Stage 2 of the vision branch: instructions about images and videos (paper §2.2.1). Run with --init RUN."""

from vllama_jax.train.config import (
    CONVERSATION,
    INSTRUCTED_CAPTION,
    VISION_BRANCH,
    DatasetConfig,
    OptimConfig,
    TrainConfig,
)

config = TrainConfig(
    model="model",
    branch="vision",
    trainable=VISION_BRANCH,
    datasets=(
        DatasetConfig(path="data/minigpt4", text=INSTRUCTED_CAPTION),
        DatasetConfig(path="data/llava_instruct", text=CONVERSATION),
        DatasetConfig(path="data/videochat", text=CONVERSATION),
    ),
    steps=3000,  # 3 epochs of 1000
    batch_size=32,  # 4 on each of 8 GPUs
    optim=OptimConfig(lr=3e-5, min_lr=1e-5, warmup_steps=1000),
)
