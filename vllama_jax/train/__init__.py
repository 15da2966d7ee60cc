"""Training from Python. `vllama_jax.train` is this package, and calling it calls its function `train`.

`train.config` defines the classes of run configs. To write your own training step, read the batches of a run with
`batches` and compute its loss with `loss_sum`; examples/training_step.py uses both.
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
    """Train a branch, or resume the run in `out` from its last checkpoint.

    The run ends after the last step, or on SIGTERM or Ctrl-C, both of which save a checkpoint first. `vllama train`
    calls this function. With several processes, call `jax.distributed.initialize` first. Compiled programs are cached
    on disk, as by `load`.

    Args:
        config: The run config.
        out: The run directory. It is created if it does not exist. `vllama_jax.load` loads the trained model from it.
        base: The base model directory, if it is no longer at `config.model`.
        reporter: Reports progress. The default is a `PrintReporter`, which prints to stderr in process 0 only.
        loss: A function (network, batch, config, dropout) → (sum, count), traced by `jax.jit`. Sum and count are added
            up over the batch and then divided. The default is `loss_sum`, the cross-entropy of labeled tokens. The
            validation loss uses the same function.
        optimizer: An optax optimizer of the trainable parameters, which are a dict by path ("video_qformer/queries").
            It replaces the default, AdamW as configured by `config.optim`. Metrics include "lr" if it is a
            `ScheduledOptimizer`.

    A custom loss or optimizer is recorded in config.json, by the name of the loss and by the tree, shapes and dtypes of
    the optimizer state. Resuming with another one raises `ConfigError` if these differ. Everything else, such as the
    optimizer's hyperparameters, cannot be compared: passing the same values is up to the caller.

    Returns:
        The run directory, the number of steps done, and the metrics of the last step.

    Raises:
        ConfigError: The config does not fit the model, the data or the devices, or `out` contains another run.
        CheckpointError: A model or run directory cannot be read, or `out` cannot be written.
        VllamaError: A process was lost, or the loss is not finite.
        KeyboardInterrupt: Ctrl-C was pressed. A `SavedInterrupt` if a checkpoint was saved.

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
    from vllama_jax.runtime.coordination import process_number
    from vllama_jax.train import loop
    from vllama_jax.train.reporter import PrintReporter, log_line, print_line

    enable_compilation_cache()
    reporter = reporter or PrintReporter(config.steps, write=log_line if process_number() else print_line)
    return loop.train(config, as_path(out), reporter, str(base), loss=loss, optimizer=optimizer)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _CallableModule(types.ModuleType):
    """A module that can be called, so that `vllama_jax.train(config, out)` works whatever was imported before.

    Importing any module of this package sets the attribute `train` of `vllama_jax` to the package, which would replace
    a function of that name.
    """

    __signature__ = inspect.signature(train)

    def __call__(self, *arguments: Any, **options: Any) -> "TrainResult":
        return train(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
# help(vllama_jax.train) and `vllama_jax.train?` show the docstring of the package, so it starts with the function's.
__doc__ = f"train{_CallableModule.__signature__}\n\n{inspect.getdoc(train)}\n\n{__doc__}"
