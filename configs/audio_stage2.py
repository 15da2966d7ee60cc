"""Stage 2 of the audio branch: instructions, with frames encoded by ImageBind (paper §2.2.2). Run with --init RUN."""

import dataclasses

from vllama_jax.train.config import (
    AUDIO_BRANCH,
    CONVERSATION,
    INSTRUCTED_CAPTION,
    DatasetConfig,
    OptimConfig,
    TrainConfig,
)

config = TrainConfig(
    model="model",
    branch="audio",
    trainable=AUDIO_BRANCH,
    datasets=(
        DatasetConfig(path="data/minigpt4", text=dataclasses.replace(INSTRUCTED_CAPTION, max_length=512)),
        DatasetConfig(path="data/llava_instruct", text=CONVERSATION),
        DatasetConfig(path="data/videochat", text=CONVERSATION),
    ),
    steps=3000,  # 3 epochs of 1000
    batch_size=32,  # 4 on each of 8 GPUs
    optim=OptimConfig(lr=3e-5, min_lr=1e-5, warmup_steps=400),
)
