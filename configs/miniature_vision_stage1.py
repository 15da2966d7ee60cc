"""Stage 1 of the miniature's vision branch: captions of rendered clips and images (docs/miniature.md)."""

from vllama_jax.train.config import DataConfig, DatasetConfig, OptimConfig, TrainConfig

config = TrainConfig(
    model="miniature/base",
    datasets=(DatasetConfig(path="miniature/world/records/captions"),),
    steps=2000,
    batch_size=32,
    optim=OptimConfig(lr=2e-3, min_lr=2e-5, warmup_steps=50, max_grad_norm=1.0),
    data=DataConfig(min_crop_area=1, length_buckets=(32, 48)),  # no crop: captions contain positions
)
