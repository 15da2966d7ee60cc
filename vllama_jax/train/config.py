"""What a training run is: frozen dataclasses with the original's defaults (reference: train_configs/*.yaml).

A run config is a Python file that defines `config = TrainConfig(...)` and states only what differs. Every field is a
flag of `vllama train`: `--optim.lr 3e-5`. Importing this file imports no jax.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, Literal

from vllama_jax.branches import BRANCHES, find_branch
from vllama_jax.config import NO_LORA, LoraConfig
from vllama_jax.data.config import (
    CONVERSATION,
    INSTRUCTED_CAPTION,
    PLAIN_CAPTION,
    DataConfig,
    DatasetConfig,
    TextConfig,
)
from vllama_jax.errors import ConfigError

__all__ = [  # all that a run config needs, so that it imports this module alone
    "AUDIO_BRANCH",
    "CONVERSATION",
    "INSTRUCTED_CAPTION",
    "LORA",
    "NO_LORA",
    "PLAIN_CAPTION",
    "VISION_BRANCH",
    "CheckpointConfig",
    "DataConfig",
    "DatasetConfig",
    "LoraConfig",
    "MeshConfig",
    "OptimConfig",
    "TextConfig",
    "TrainConfig",
    "ValidationConfig",
]

# What learns in each branch, as patterns on the weights' paths (fnmatch; * crosses /).
VISION_BRANCH = BRANCHES["vision"].trainable
AUDIO_BRANCH = BRANCHES["audio"].trainable
LORA = ("llama/*/lora/*",)

# Fields that earlier versions named differently, old → new; * is the number of a dataset. Old run directories load by
# this table, and a config or an option with an old name is answered with the new one.
RENAMED_FIELDS = {
    "accumulation": "grad_accum_steps",
    "remat": "remat_policy",
    "optim.clip_norm": "optim.max_grad_norm",
    "data.lengths": "data.length_buckets",
    "data.crop_area": "data.min_crop_area",
    "data.crop_ratio": "data.max_crop_aspect_ratio",
    "data.threads": "data.num_threads",
    "data.processes": "data.num_workers",
    "data.features": "data.feature_cache",
    "datasets.*.frames": "datasets.*.frame_sampling",
    "datasets.*.held_out": "datasets.*.holdout",
    "checkpoint.every": "checkpoint.save_interval_steps",
    "checkpoint.keep_last": "checkpoint.max_to_keep",
    "checkpoint.keep_every": "checkpoint.keep_period",
    "validation.every": "validation.interval_steps",
    "validation.batches": "validation.num_batches",
}


def rename_fields(fields: Any, prefix: str = "") -> Any:
    """Return a recorded TrainConfig with the current names of its fields.

    Args:
        fields: The config as nested objects and lists, as JSON gives them. A field that has its current name stays.
        prefix: The dotted name of `fields` in the config, with a trailing dot.
    """
    if isinstance(fields, list):
        return [rename_fields(item, f"{prefix}*.") for item in fields]
    if not isinstance(fields, Mapping):
        return fields
    return {
        RENAMED_FIELDS.get(prefix + name, prefix + name).rsplit(".", 1)[-1]: rename_fields(value, f"{prefix}{name}.")
        for name, value in fields.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, with a warm-up and a cosine (reference: optims.py, runner_base.py).

    Attributes:
        lr: Where the cosine starts.
        min_lr: Where it ends.
        warmup_lr: Where the linear warm-up starts.
        warmup_steps: How long it lasts. The cosine runs from step 0, so the rate drops a little at its end.
        weight_decay: Of matrices, queries and positions; biases and norms have none.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of their squares.
        eps: Added to the root of the second.
        max_grad_norm: Gradients are scaled down to this global norm; 0 for no clipping, as the original.
    """

    lr: float = 1e-4
    min_lr: float = 8e-5
    warmup_lr: float = 1e-6
    warmup_steps: int = 2500
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each axis of the mesh has (sharding.py).

    Attributes:
        data: Devices that share a batch, each with all weights; 0 takes all that the other axes leave.
        fsdp: Devices that share a batch and the weights of each layer; 0 for the fewest with which the run fits
            (memory/mesh.py).
        tensor: Devices that share each matrix product.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1


AUTO_MESH = MeshConfig(fsdp=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept.

    Attributes:
        save_interval_steps: Steps between checkpoints. The last step and a SIGTERM save too.
        max_to_keep: How many are kept, besides those of keep_period.
        keep_period: Checkpoints at multiples of this are kept for good; 0 for none.
        on_error: What happens when one cannot be written (a full disk): the run stops, or says so and goes on.
    """

    save_interval_steps: int = 500
    max_to_keep: int = 2
    keep_period: int = 0
    on_error: Literal["stop", "continue"] = "stop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is looked at on the way.

    Attributes:
        interval_steps: Steps between looks; 0 for none.
        num_batches: How many batches of held-out records the loss is the mean of.
        clips: Files that the model is asked about; its answers go into samples.jsonl.
        question: What it is asked.
        max_new_tokens: How long an answer may be.
    """

    interval_steps: int = 0
    num_batches: int = 4
    clips: tuple[str, ...] = ()
    question: str = "Describe what you see and hear."
    max_new_tokens: int = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run.

    Attributes:
        model: The base model directory.
        init: A run whose weights this one starts from: stage 2 from stage 1.
        branch: The branch that the media go through (branches.py): vision, or audio, where frames go through
            ImageBind's vision tower.
        trainable: Patterns (fnmatch) on the paths of the weights that learn.
        datasets: What it learns from.
        steps: How many steps; the cosine of the learning rate ends there.
        batch_size: Samples a step, over all devices.
        grad_accum_steps: A step's batch is run in so many parts, one after the other, for memory.
        dropout: In the Q-Former that learns.
        remat_policy: What LLaMA's backward pass computes again: "full" keeps only each layer's input, "dots" also the
            products with weights, "none" everything.
        compute_dtype: Of frozen weights and of all products; auto is float32 on a CPU and bfloat16 elsewhere.
        seed: Of the data's order, crops, dropout, and of weights that start at random.
        optim: The optimizer and its learning rate.
        data: How records become batches.
        lora: Low-rank updates of the language model; rank 0 for none.
        mesh: How devices are arranged; chosen by memory unless given.
        checkpoint: What is kept.
        validation: What is looked at on the way.
    """

    model: str
    init: str = ""
    branch: str = "vision"
    trainable: tuple[str, ...] = VISION_BRANCH
    datasets: tuple[DatasetConfig, ...]
    steps: int
    batch_size: int
    grad_accum_steps: int = 1
    dropout: float = 0.1
    remat_policy: Literal["full", "dots", "none"] = "full"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 42
    optim: OptimConfig = OptimConfig()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    lora: LoraConfig = NO_LORA
    mesh: MeshConfig = AUTO_MESH
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()

    def __post_init__(self) -> None:
        find_branch(self.branch)
        _check_numbers(self)
        if not self.datasets:
            raise ConfigError("datasets: there are none; name at least one records directory")
        if not self.trainable:
            raise ConfigError("trainable: there are no patterns; nothing would learn")
        if self.batch_size % self.grad_accum_steps:
            raise ConfigError(
                f"batch_size {self.batch_size} is no multiple of grad_accum_steps {self.grad_accum_steps}"
            )
        if tuple(sorted(self.data.length_buckets)) != self.data.length_buckets:
            raise ConfigError(f"data.length_buckets must rise, not {self.data.length_buckets}")
        if self.validation.interval_steps and not (self.validation.clips or any(d.holdout for d in self.datasets)):
            raise ConfigError("validation.interval_steps is set, but no dataset has a holdout and there are no clips")


# What a number must be at least; all must be finite.
_MINIMUM = {
    "steps": 1,
    "batch_size": 1,
    "grad_accum_steps": 1,
    "seed": 0,
    "optim.lr": 0,
    "optim.min_lr": 0,
    "optim.warmup_lr": 0,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0,
    "optim.eps": 0,
    "optim.max_grad_norm": 0,
    "data.variants": 0,
    "data.num_threads": 1,
    "data.num_workers": 0,
    "data.prefetch": 1,
    "data.max_crop_aspect_ratio": 1,
    "lora.rank": 0,
    "mesh.data": 0,
    "mesh.fsdp": 0,
    "mesh.tensor": 1,
    "checkpoint.save_interval_steps": 1,
    "checkpoint.max_to_keep": 1,
    "checkpoint.keep_period": 0,
    "validation.interval_steps": 0,
    "validation.num_batches": 1,
    "validation.max_new_tokens": 1,
}
_FRACTIONS = ("dropout", "optim.beta1", "optim.beta2")


def _check_numbers(config: TrainConfig) -> None:
    """Raises ConfigError that names the field, as the flag is called."""
    for path, low in _MINIMUM.items():
        value = operator.attrgetter(path)(config)
        if not (math.isfinite(value) and value >= low):
            raise ConfigError(f"{path} must be at least {low}, not {value}")
    for path in _FRACTIONS:
        value = operator.attrgetter(path)(config)
        if not 0 <= value < 1:
            raise ConfigError(f"{path} must be at least 0 and below 1, not {value}")
    if not 0 < config.data.min_crop_area <= 1:
        raise ConfigError(f"data.min_crop_area must be above 0 and at most 1, not {config.data.min_crop_area}")
    for number, dataset in enumerate(config.datasets):
        if not (math.isfinite(dataset.ratio) and dataset.ratio > 0):
            raise ConfigError(f"datasets.{number}.ratio must be above 0, not {dataset.ratio}")
        if dataset.holdout < 0 or dataset.text.max_length < 1:
            raise ConfigError(f"datasets.{number}: holdout must be at least 0 and text.max_length at least 1")


def resolve_mesh(mesh: MeshConfig, devices: int) -> MeshConfig:
    """The mesh over so many devices, with data's places counted. Raises ConfigError for numbers that mean nothing."""
    if mesh.data < 0 or mesh.fsdp < 1 or mesh.tensor < 1:
        raise ConfigError(f"mesh.data must be at least 0, mesh.fsdp and mesh.tensor at least 1, not {mesh}")
    return dataclasses.replace(mesh, data=mesh.data or max(devices // (mesh.fsdp * mesh.tensor), 1))


def rows_per_shard(config: TrainConfig, mesh: MeshConfig) -> int:
    """Rows that each place of the mesh computes at a time. Raises ConfigError when the batch does not divide."""
    rows, places = config.batch_size // config.grad_accum_steps, mesh.data * mesh.fsdp
    if rows % places:
        part = "" if config.grad_accum_steps == 1 else f" over grad_accum_steps {config.grad_accum_steps}"
        raise ConfigError(
            f"batch_size {config.batch_size}{part} does not divide over {places} places of the mesh "
            f"(data {mesh.data} × fsdp {mesh.fsdp}); change one of them"
        )
    return rows // places
