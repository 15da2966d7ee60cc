"""The classes of run configs: frozen dataclasses with the original's defaults (reference: train_configs/*.yaml).

A run config is a Python file that defines `config = TrainConfig(...)` with the fields that differ from the defaults.
Every field is an option of `vllama train`, such as `--optim.lr 3e-5`. Importing this module does not import jax.
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

__all__ = [  # a run config needs to import only this module
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

# Patterns of the trainable parameters of each branch, matched with their paths (fnmatch: * also matches /).
VISION_BRANCH = BRANCHES["vision"].trainable
AUDIO_BRANCH = BRANCHES["audio"].trainable
LORA = ("llama/*/lora/*",)

# Renamed fields, old → new; * is the number of a dataset. Run directories of earlier versions are loaded with this
# table, and the error for an old name in a config or an option contains the new one.
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
    """Replace the old names of fields in a recorded TrainConfig by the current ones (`RENAMED_FIELDS`).

    Args:
        fields: The config as nested dicts and lists, as read from JSON. Fields with current names are not changed.
        prefix: The dotted name of `fields` in the config, with a trailing dot.

    Returns:
        The fields with current names.
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
    """AdamW with linear warm-up and cosine decay of the learning rate (reference: optims.py, runner_base.py).

    Attributes:
        lr: Learning rate at the start of the cosine decay.
        min_lr: Final learning rate, at the last step.
        warmup_lr: Learning rate at the start of the linear warm-up.
        warmup_steps: Number of warm-up steps. The cosine starts at step 0, so the rate drops slightly when the warm-up
            ends.
        weight_decay: Weight decay of matrices, queries and positions. Biases and norms are not decayed.
        beta1: Decay rate of the moving average of gradients.
        beta2: Decay rate of the moving average of squared gradients.
        eps: Added to the square root of the second moving average.
        max_grad_norm: Gradients are scaled down to this global norm. 0 disables clipping, as in the original.
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
    """The size of each axis of the device mesh (sharding.py).

    Attributes:
        data: Shards of the batch, with parameters replicated. 0 uses all devices that the other axes leave.
        fsdp: Shards of the batch and of the parameters of each layer; 0 for the fewest with which the run fits
            (memory/mesh.py).
        tensor: Shards of heads and hidden dimensions within a layer.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1


AUTO_MESH = MeshConfig(fsdp=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, and which of them are kept.

    Attributes:
        save_interval_steps: Steps between checkpoints. The last step, SIGTERM and Ctrl-C save a checkpoint too.
        max_to_keep: Number of latest checkpoints to keep, in addition to those of `keep_period`.
        keep_period: Checkpoints at multiples of this step are never removed. 0 for none.
        on_error: What to do if a checkpoint cannot be written, for example because the disk is full: "stop" ends the
            run, "continue" reports the error and continues.
    """

    save_interval_steps: int = 500
    max_to_keep: int = 2
    keep_period: int = 0
    on_error: Literal["stop", "continue"] = "stop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation during the run: the loss on held-out records, and answers about given files.

    Attributes:
        interval_steps: Steps between validations. 0 disables validation.
        num_batches: Number of batches of held-out records to compute the loss on.
        clips: Media files to ask the model about. Its answers are written to samples.jsonl.
        question: The question about each of `clips`.
        max_new_tokens: Maximum length of an answer, in tokens.
    """

    interval_steps: int = 0
    num_batches: int = 4
    clips: tuple[str, ...] = ()
    question: str = "Describe what you see and hear."
    max_new_tokens: int = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The config of a run.

    Attributes:
        model: The base model directory, or hf://OWNER/NAME on the Hugging Face Hub.
        init: The init run, whose trained parameters this run starts from, as stage 2 from stage 1. Empty for none.
        branch: The branch to train: "vision", or "audio", which is trained on frames that ImageBind's
            vision tower encodes.
        trainable: Patterns (fnmatch) of the paths of the trainable parameters.
        datasets: The datasets to train on.
        steps: Number of steps. The cosine of the learning rate ends at the last one.
        batch_size: Examples in a step, over all devices.
        grad_accum_steps: Number of micro-batches that a batch is divided into, which run one after the other. Reduces
            memory; the gradient is the same.
        dropout: Dropout rate of the trainable Q-Former.
        remat_policy: Activations of LLaMA that are stored for the backward pass; all others are recomputed. "full"
            stores only the input of each layer, "dots" also the outputs of matrix products with weights, "none" stores
            everything.
        compute_dtype: Dtype of frozen parameters and of matrix products. "auto" is float32 on CPUs and bfloat16 on
            other devices.
        seed: Seed of the data order, random crops, dropout and newly initialized parameters.
        optim: The optimizer and its learning rate.
        data: How records are made into batches.
        lora: Low-rank updates of the language model. Rank 0 for none.
        mesh: The device mesh, chosen by memory unless given.
        checkpoint: When checkpoints are saved, and which of them are kept.
        validation: Validation during the run.
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
            raise ConfigError("datasets is empty; give at least one records directory")
        if not self.trainable:
            raise ConfigError("trainable is empty; give at least one pattern of parameter paths")
        if self.batch_size % self.grad_accum_steps:
            raise ConfigError(
                f"batch_size {self.batch_size} is not a multiple of grad_accum_steps {self.grad_accum_steps}"
            )
        if tuple(sorted(self.data.length_buckets)) != self.data.length_buckets:
            raise ConfigError(f"data.length_buckets must be in increasing order, not {self.data.length_buckets}")
        if self.validation.interval_steps and not (self.validation.clips or any(d.holdout for d in self.datasets)):
            raise ConfigError(
                "validation.interval_steps is set, but there is nothing to validate on: "
                "set holdout of a dataset, or validation.clips"
            )


# The minimum of each number. All must be finite.
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
    """Raise ConfigError, with the field's option, for a number out of range."""
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
    """Replace size 0 of the axis `data` by the number of devices that the other axes leave.

    Args:
        mesh: The config of the mesh.
        devices: Number of devices, over all hosts.

    Returns:
        The config with all three sizes set. Their product is not checked.

    Raises:
        ConfigError: A size is out of range.
    """
    if mesh.data < 0 or mesh.fsdp < 1 or mesh.tensor < 1:
        raise ConfigError(f"mesh.data must be at least 0, mesh.fsdp and mesh.tensor at least 1, not {mesh}")
    return dataclasses.replace(mesh, data=mesh.data or max(devices // (mesh.fsdp * mesh.tensor), 1))


def rows_per_shard(config: TrainConfig, mesh: MeshConfig) -> int:
    """Compute the rows of a micro-batch in each of the `mesh.data * mesh.fsdp` shards of the batch.

    Raises:
        ConfigError: The micro-batch is not divisible by the number of shards.
    """
    rows, shards = config.batch_size // config.grad_accum_steps, mesh.data * mesh.fsdp
    if rows % shards:
        divisor = "" if config.grad_accum_steps == 1 else f" / grad_accum_steps {config.grad_accum_steps}"
        raise ConfigError(
            f"batch_size {config.batch_size}{divisor} is not divisible by the {shards} shards of the batch "
            f"(mesh.data {mesh.data} × mesh.fsdp {mesh.fsdp}); change one of them"
        )
    return rows // shards
