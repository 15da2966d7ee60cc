"""Training from Python. `vllama_jax.train` is both this package and, called, its function `train`.

`config` has the classes of a run config. For a training step of your own, `batches` reads what a run's steps are given
and `loss_sum` is a run's loss; examples/training_step.py uses both.
"""

import importlib
import inspect
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllama_jax.train.config import TrainConfig

if TYPE_CHECKING:
    from vllama_jax.train.loop import TrainResult
    from vllama_jax.train.optim import ScheduledOptimizer, make_optimizer
    from vllama_jax.train.reporter import PrintReporter, Reporter
    from vllama_jax.train.setup import batches
    from vllama_jax.train.step import Batch, Loss, Optimizer, loss_sum

_MODULES = {
    "Batch": "step",
    "Loss": "step",
    "Optimizer": "step",
    "PrintReporter": "reporter",
    "Reporter": "reporter",
    "ScheduledOptimizer": "optim",
    "TrainResult": "loop",
    "batches": "setup",
    "loss_sum": "step",
    "make_optimizer": "optim",
}

__all__ = [
    "Batch",
    "Loss",
    "Optimizer",
    "PrintReporter",
    "Reporter",
    "ScheduledOptimizer",
    "TrainConfig",
    "TrainResult",
    "batches",
    "loss_sum",
    "make_optimizer",
    "train",
]


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    base: str | Path = "",
    reporter: "Reporter | None" = None,
    loss: "Loss | None" = None,
    optimizer: "Optimizer | None" = None,
) -> "TrainResult":
    """Train, or resume from the last checkpoint in `out`, until the last step, SIGTERM or Ctrl-C; both save first.

    This is what `vllama train` does. With several processes, call `jax.distributed.initialize` before. Programs are
    kept on disk, as by `load`.

    Args:
        config: The run.
        out: The run directory, which is made. `vllama_jax.load` reads it as the model that was trained.
        base: The base model directory, if it is no longer where the config has it.
        reporter: Shows how the run goes; a `PrintReporter`, which prints to stderr, unless given.
        loss: The sum of a batch's loss and what to divide it by, of (network, batch, config, dropout), under `jax.jit`;
            `loss_sum`, the cross-entropy of labeled tokens, unless given. The validation loss is of the same function.
        optimizer: An optax optimizer of the trainable weights, a dict by path ("video_qformer/queries"). The AdamW of
            `config.optim`, which is not used then, unless given. Metrics have "lr" where it is a `ScheduledOptimizer`.

    A loss and an optimizer are recorded in the run's config.json, by the loss's name and the layout of the optimizer's
    state. Resuming with others is refused as far as these show; what cannot be compared, such as the optimizer's
    hyperparameters, is up to the caller.

    Returns:
        The run directory, the steps done, and the metrics of the last one.

    Raises:
        ConfigError: The config does not fit the model, the data or the devices, or `out` holds another run.
        CheckpointError: A model or run directory cannot be read, or `out` not written.
        VllamaError: A process was lost, or the loss is not a number.
        KeyboardInterrupt: Ctrl-C; a SavedInterrupt once a checkpoint was saved.

    Example:
        >>> import dataclasses
        >>> from pathlib import Path
        >>> import vllama_jax as vl
        >>> from vllama_jax.configs import smoke  # eight rendered clips, and a tiny model of random weights
        >>> config = smoke.prepare(dataclasses.replace(smoke.config, steps=2, batch_size=8), Path("run"))
        >>> result = vl.train(config, "run")
        >>> result.step
        2
        >>> result.metrics["loss"] > 0
        True
        >>> model = vl.load(result.path)
    """
    from vllama_jax.io.paths import as_path
    from vllama_jax.runtime.compilation_cache import enable_compilation_cache
    from vllama_jax.train import loop
    from vllama_jax.train.reporter import PrintReporter

    enable_compilation_cache()
    reporter = reporter or PrintReporter(config.steps)
    return loop.train(config, as_path(out), reporter, str(base), loss=loss, optimizer=optimizer)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _CallableModule(types.ModuleType):
    """Makes `vllama_jax.train(config, out)` work, whatever was imported before.

    Importing any module below this package sets the attribute `train` of `vllama_jax` to the package, so that a
    function of that name there would last until then.
    """

    __signature__ = inspect.signature(train)

    def __call__(self, *arguments: Any, **options: Any) -> "TrainResult":
        return train(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
# help(vllama_jax.train) and `vllama_jax.train?` show the docstring of the package: what to pass comes first in it.
__doc__ = f"train{_CallableModule.__signature__}\n\n{inspect.getdoc(train)}\n\n{__doc__}"
