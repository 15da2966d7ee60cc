"""Compare the output of each layer of a model with that of PyTorch, computed from the files it was converted from.

Both sides read one layer at a time, so that a model of any size can be compared on a small machine.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vllama_jax.checkpoints import quantize as quantizing
from vllama_jax.checkpoints.directory import ModelDirectory
from vllama_jax.checkpoints.quantize import resolve_scheme
from vllama_jax.checkpoints.reader import make_row_reader
from vllama_jax.convert.conversion import ConversionPlan
from vllama_jax.convert.verify.weights import check_comparable
from vllama_jax.convert.weight_files import Source
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.runtime.extras import import_extra

if TYPE_CHECKING:
    from vllama_jax.convert.verify.stages import Component, Stage

ComputeDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds of the differences between the two sides.

    Attributes:
        relative: The largest relative error of a layer.
        mean_kl: The largest mean KL divergence of the next token, in nats.
        top1: The smallest fraction of positions with the same most likely token.
    """

    relative: float
    mean_kl: float
    top1: float


BOUNDS = {"float32": Bounds(1e-4, 1e-6, 0.999), "bfloat16": Bounds(5e-2, 1e-2, 0.9)}
# Errors of quantized weights are reported, also whether they exceed these bounds, but are not a failure.
QUANTIZED_BOUNDS = {"int8": Bounds(0.1, 1e-2, 0.95), "int4": Bounds(1.0, 0.2, 0.8)}


@dataclasses.dataclass(frozen=True)
class LayerError:
    """The error of the output of one layer.

    Attributes:
        component: The component.
        layer: The stage, such as "layer 3".
        maximum: max|ours - PyTorch's|.
        relative: The same divided by max|PyTorch's|.
    """

    component: str
    layer: str
    maximum: float
    relative: float


@dataclasses.dataclass(frozen=True)
class LogitsError:
    """The error of the logits of a prompt.

    Attributes:
        positions: The number of tokens of the prompt.
        mean_kl: The mean of KL(PyTorch ‖ ours) of the next token, in nats.
        max_kl: The largest one.
        top1: The fraction of positions with the same most likely token.
    """

    positions: int
    mean_kl: float
    max_kl: float
    top1: float


@dataclasses.dataclass(frozen=True)
class VerifySettings:
    """Settings of a comparison.

    Attributes:
        dtype: The compute dtype of the model. PyTorch computes in float32.
        tokens: The length of the prompt.
        seed: The seed of the random inputs.
        quantize: The quantization scheme to apply to the model, if any.
    """

    dtype: ComputeDtype = "float32"
    tokens: int = 1024
    seed: int = 0
    quantize: str | None = None


def check_installed() -> None:
    """Raise ConfigError if torch or transformers is not installed."""
    for name in ("torch", "transformers"):
        import_extra(name, "verify", "running the PyTorch side", ConfigError, "add --weights-only")


def compare_networks(
    directory: ModelDirectory, plan: ConversionPlan, settings: VerifySettings, progress: Callable[[str, int, int], None]
) -> tuple[list[LayerError], LogitsError]:
    """Compare the output of every layer of every component, on the same random input, and the logits.

    The input of a layer is the same side's output of the previous one, so that errors accumulate as in use. The
    source's tensors are rounded to the dtype of the model's weights.

    Args:
        directory: The model directory.
        plan: The plan of a conversion from its PyTorch files.
        settings: Dtype, prompt length, seed and quantization.
        progress: Called with the current stage, the number of completed stages and the total number.

    Returns:
        The error of each layer, and that of the language model's logits.

    Raises:
        CheckpointError: As `check_comparable`, or a file cannot be read.
        ConfigError: As `check_comparable`.
    """
    import jax
    import torch

    from vllama_jax.convert.verify.reference.llama import configuration
    from vllama_jax.convert.verify.stages import model_components

    check_comparable(directory, plan)
    tokens = min(settings.tokens, directory.config.llama.max_length)
    llama_config = configuration(plan.tokenizer_directory, plan.config.llama)
    components = [
        component for component in model_components(plan.config, llama_config, tokens) if _source(component, plan)
    ]
    total = sum(len(component.stages) for component in components)
    errors: list[LayerError] = []
    sides = make_jax_runner(directory, settings.dtype, settings.quantize), _make_torch_runner(directory, plan)
    with jax.default_matmul_precision("highest"), torch.inference_mode():
        for component in components:
            x = component.random_input(np.random.default_rng(settings.seed))
            carries: list[Any] = [x, torch.from_numpy(x)]
            for stage in component.stages:
                progress(f"{component.name}, {stage.name}", len(errors), total)
                carries = [run(component, stage, carry) for run, carry in zip(sides, carries, strict=True)]
                ours, theirs = map(_compared_array, carries)
                errors.append(LayerError(component.name, stage.name, *_max_errors(ours, theirs)))
    return errors, _logits_error(ours[0], theirs[0])


def _source(component: "Component", plan: ConversionPlan) -> Source | None:
    """Return the file of a component's weights; of `llama_proj`, it may be MiniGPT-4's."""
    found = plan.sources.get(component.file_type)
    return plan.sources.get("minigpt4") if found is None and component.name == "llama_proj" else found


StageRunner = Callable[["Component", "Stage", Any], Any]


def make_jax_runner(directory: ModelDirectory, dtype: ComputeDtype, quantize: str | None = None) -> StageRunner:
    """Return a function that runs a stage in JAX, on a network of one layer with the weights of the stage.

    Args:
        directory: The model directory.
        dtype: The compute dtype.
        quantize: The quantization scheme to apply, if any.

    Returns:
        (component, stage, output of the previous stage) → output of the stage.
    """
    import jax
    from flax import nnx

    from vllama_jax.convert.verify.stages import one_layer

    network, layers = quantizing.abstract_layers(
        one_layer(directory.config), dtype, resolve_scheme(directory, quantize)
    )
    read = make_row_reader(directory) if directory.quantized else quantizing.make_quantizing_reader(directory, layers)
    graph, abstract = nnx.split(network)
    shapes = {"/".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(abstract)}

    @functools.partial(jax.jit, static_argnums=0)
    def computed(ours: Callable[..., Any], weights: dict[str, jax.Array], carry: Any) -> Any:
        state = dict(shapes.values())
        for name, weight in weights.items():
            path, variable = shapes[name]
            state[path] = variable.replace(weight)
        return ours(nnx.merge(graph, nnx.from_flat_state(state)), carry)

    def run(component: "Component", stage: "Stage", carry: Any) -> Any:
        needed = [name for name in shapes if any(fnmatch.fnmatchcase(name, pattern) for pattern in stage.leaves)]
        weights = {name: _rows(read(name, stage.row), stage.row).astype(shapes[name][1].dtype) for name in needed}
        return jax.block_until_ready(computed(stage.ours, weights, carry))

    return run


def _rows(weight: np.ndarray, row: int | None) -> np.ndarray:
    """Return a weight, with an axis of one layer if it is a row of a stacked weight."""
    return weight if row is None else weight[None]


def _make_torch_runner(directory: ModelDirectory, plan: ConversionPlan) -> StageRunner:
    """Return a function that runs a stage in PyTorch, in float32."""
    import torch

    rounded: dict[tuple[Source, str], str] = {}
    stored = directory.manifest["leaves"]
    for leaf in plan.leaves:
        dtype = stored[leaf.rule.target]["dtype"] if leaf.rule.target in stored else "float32"  # quantized
        rounded |= {(leaf.source, name): dtype for names in leaf.rule.names() for name in names}

    def run(component: "Component", stage: "Stage", carry: Any) -> Any:
        source = _source(component, plan)
        assert source is not None  # only components with a file are compared

        def read(name: str) -> torch.Tensor:
            values = source.read(name).astype(rounded[source, name], copy=False)
            return torch.from_numpy(np.array(values, np.float32))

        return stage.theirs(read, carry)

    return run


def _compared_array(carry: Any) -> np.ndarray:
    return np.asarray(carry[0] if isinstance(carry, tuple) else carry, np.float32)


def _max_errors(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    if ours.shape != theirs.shape:
        raise CheckpointError(f"the output of a layer is {ours.shape}, but {theirs.shape} in PyTorch")
    largest = float(np.abs(ours - theirs).max())
    scale = float(np.abs(theirs).max())
    return largest, largest / scale if scale else math.inf if largest else 0.0


def _logits_error(ours: np.ndarray, theirs: np.ndarray) -> LogitsError:
    """Compare logits [positions, vocabulary]."""
    divergences = np.array([_divergence(*rows) for rows in zip(theirs, ours, strict=True)])
    top1 = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    return LogitsError(len(ours), float(divergences.mean()), float(divergences.max()), float(top1))


def _divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Compute KL(reference ‖ other) of two rows of logits in float64."""
    log_p, log_q = (row - np.logaddexp.reduce(row) for row in (reference.astype(np.float64), other.astype(np.float64)))
    return float(np.sum(np.exp(log_p) * (log_p - log_q)))


def check_errors(
    errors: list[LayerError], logits: LogitsError, dtype: ComputeDtype, scheme: str | None
) -> tuple[list[str], list[str]]:
    """Compare errors with their bounds.

    Args:
        errors: The error of each layer.
        logits: The error of the logits.
        dtype: The compute dtype.
        scheme: The quantization scheme of the model, if any.

    Returns:
        The failures, and the errors of quantized components that exceed `QUANTIZED_BOUNDS`, which are no failures.
    """
    from vllama_jax.nn.quantized import LLAMA_LAYERS

    if scheme is None:
        return find_exceeded_bounds(errors, logits, BOUNDS[dtype]), []
    components = {"vit", *(path.split("/")[0] for path in LLAMA_LAYERS)}
    exact = [error for error in errors if error.component not in components]
    quantized = [error for error in errors if error.component in components]
    failures = find_exceeded_bounds(exact, None, BOUNDS[dtype])
    return failures, find_exceeded_bounds(quantized, logits, QUANTIZED_BOUNDS[scheme])


def find_exceeded_bounds(errors: list[LayerError], logits: LogitsError | None, bounds: Bounds) -> list[str]:
    """Return a line for each component, of its first layer beyond the bound, and for the logits. NaN is beyond any."""
    found: dict[str, str] = {}
    for error in errors:
        if not error.relative <= bounds.relative:
            line = f"{error.component}, {error.layer}: relative error {error.relative:.1e}, above {bounds.relative:.0e}"
            found.setdefault(error.component, line)
    if logits is None:
        return list(found.values())
    if not logits.mean_kl <= bounds.mean_kl:
        found["kl"] = f"logits: mean KL {logits.mean_kl:.1e}, above {bounds.mean_kl:.0e}"
    if not logits.top1 >= bounds.top1:
        found["top1"] = f"logits: the same most likely token at {logits.top1:.1%} of positions, below {bounds.top1:.1%}"
    return list(found.values())
