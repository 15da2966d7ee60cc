"""Stage 1 of the miniature's audio branch: the data of the vision branch, with frames encoded by ImageBind."""

import dataclasses

from vllama_jax.configs.miniature_vision_stage1 import config as vision
from vllama_jax.train.config import AUDIO_BRANCH

config = dataclasses.replace(vision, branch="audio", trainable=AUDIO_BRANCH, steps=6000, dropout=0.25)
