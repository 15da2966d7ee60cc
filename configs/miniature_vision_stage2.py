"""Stage 2 of the miniature's vision branch: questions and answers. Run with --init RUN."""

import dataclasses

from vllama_jax.configs.miniature_vision_stage1 import config as stage1
from vllama_jax.train.config import CONVERSATION, DatasetConfig

config = dataclasses.replace(
    stage1,
    datasets=(DatasetConfig(path="miniature/world/records/instructions", text=CONVERSATION),),
    steps=600,
    batch_size=16,
    optim=dataclasses.replace(stage1.optim, lr=1e-3),
    data=dataclasses.replace(stage1.data, length_buckets=(72, 96, 144)),
)
