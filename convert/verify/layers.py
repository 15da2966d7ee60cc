"""Whether a model computes what PyTorch computes from the files that it was made from, layer by layer.

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
    """The largest relative error of a layer, the largest mean KL divergence of the next token's probabilities, and the
    smallest share of positions at which both sides find the same token likeliest."""

    relative: float
    mean_kl: float
    top1: float


BOUNDS = {"float32": Bounds(1e-4, 1e-6, 0.999), "bfloat16": Bounds(5e-2, 1e-2, 0.9)}
# What quantised weights cost is told, and whether it is more than this; it is no failure.
QUANTIZED_BOUNDS = {"int8": Bounds(0.1, 1e-2, 0.95), "int4": Bounds(1.0, 0.2, 0.8)}


@dataclasses.dataclass(frozen=True)
class LayerError:
    """max|ours − torch's|, and the same over max|torch's|."""

    component: str
    layer: str
    maximum: float
    relative: float


@dataclasses.dataclass(frozen=True)
class LogitsError:
    """Over a prompt's positions; KL of ours from torch's in nats."""

    positions: int
    mean_kl: float
    max_kl: float
    top1: float


@dataclasses.dataclass(frozen=True)
class VerifySettings:
    """dtype: in which ours computes. tokens: the prompt's length. seed: of the inputs. quantize: ours, where asked."""

    dtype: ComputeDtype = "float32"
    tokens: int = 1024
    seed: int = 0
    quantize: str | None = None


def check_installed() -> None:
    """Raises ConfigError where what runs the PyTorch side is missing."""
    for name in ("torch", "transformers"):
        import_extra(name, "verify", "running the PyTorch side", ConfigError, "add --weights-only")


def compare_networks(
    directory: ModelDirectory, plan: ConversionPlan, settings: VerifySettings, progress: Callable[[str, int, int], None]
) -> tuple[list[LayerError], LogitsError]:
    """The output of every layer of every part, on the same random input, and the language model's logits.

    Each side goes on from its own output, so that errors add up as they do in use. The source's tensors are rounded as
    the model's weights are. progress is called with what is computed now, how many stages are done, and of how many.
    Raises CheckpointError as `check_comparable` does.
    """
    import jax
    import torch

    from vllama_jax.convert.verify.reference.llama import configuration
    from vllama_jax.convert.verify.stages import model_components

    check_comparable(directory, plan)
    tokens = min(settings.tokens, directory.config.llama.max_length)
    found = [
        part
        for part in model_components(plan.config, configuration(plan.tokenizer_directory, plan.config.llama), tokens)
        if _source(part, plan)
    ]
    total = sum(len(part.stages) for part in found)
    errors: list[LayerError] = []
    sides = make_jax_runner(directory, settings.dtype, settings.quantize), _make_torch_runner(directory, plan)
    with jax.default_matmul_precision("highest"), torch.inference_mode():
        for part in found:
            x = part.random_input(np.random.default_rng(settings.seed))
            carries: list[Any] = [x, torch.from_numpy(x)]
            for stage in part.stages:
                progress(f"{part.name}, {stage.name}", len(errors), total)
                carries = [run(part, stage, carry) for run, carry in zip(sides, carries, strict=True)]
                ours, theirs = map(_compared_array, carries)
                errors.append(LayerError(part.name, stage.name, *_max_errors(ours, theirs)))
    return errors, _logits_error(ours[0], theirs[0])


def _source(part: "Component", plan: ConversionPlan) -> Source | None:
    """The file that a part's weights come from; a projection may be MiniGPT-4's."""
    found = plan.sources.get(part.file_type)
    return plan.sources.get("minigpt4") if found is None and part.name == "llama_proj" else found


StageRunner = Callable[["Component", "Stage", Any], Any]


def make_jax_runner(directory: ModelDirectory, dtype: ComputeDtype, quantize: str | None = None) -> StageRunner:
    """Runs a stage on a network of one layer, in which only the weights that the stage needs have values."""
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

    def run(part: "Component", stage: "Stage", carry: Any) -> Any:
        needed = [name for name in shapes if any(fnmatch.fnmatchcase(name, pattern) for pattern in stage.leaves)]
        weights = {name: _rows(read(name, stage.row), stage.row).astype(shapes[name][1].dtype) for name in needed}
        return jax.block_until_ready(computed(stage.ours, weights, carry))

    return run


def _rows(weight: np.ndarray, row: int | None) -> np.ndarray:
    """A weight, or a layer's as a stack of one."""
    return weight if row is None else weight[None]


def _make_torch_runner(directory: ModelDirectory, plan: ConversionPlan) -> StageRunner:
    """Runs a stage in torch, in float32."""
    import torch

    rounded: dict[tuple[Source, str], str] = {}
    held = directory.manifest["leaves"]
    for leaf in plan.leaves:
        dtype = held[leaf.rule.target]["dtype"] if leaf.rule.target in held else "float32"  # quantised
        rounded |= {(leaf.source, name): dtype for names in leaf.rule.names() for name in names}

    def run(part: "Component", stage: "Stage", carry: Any) -> Any:
        source = _source(part, plan)
        assert source is not None  # only parts that have one are compared

        def read(name: str) -> torch.Tensor:
            values = source.read(name).astype(rounded[source, name], copy=False)
            return torch.from_numpy(np.array(values, np.float32))

        return stage.theirs(read, carry)

    return run


def _compared_array(carry: Any) -> np.ndarray:
    return np.asarray(carry[0] if isinstance(carry, tuple) else carry, np.float32)


def _max_errors(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    if ours.shape != theirs.shape:
        raise CheckpointError(f"a layer gives {ours.shape}, and torch's {theirs.shape}")
    largest = float(np.abs(ours - theirs).max())
    scale = float(np.abs(theirs).max())
    return largest, largest / scale if scale else math.inf if largest else 0.0


def _logits_error(ours: np.ndarray, theirs: np.ndarray) -> LogitsError:
    """Of [position, vocabulary]."""
    divergences = np.array([_divergence(*rows) for rows in zip(theirs, ours, strict=True)])
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    return LogitsError(len(ours), float(divergences.mean()), float(divergences.max()), float(same))


def _divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """KL(reference ‖ other) of two rows of logits, computed in float64."""
    log_p, log_q = (row - np.logaddexp.reduce(row) for row in (reference.astype(np.float64), other.astype(np.float64)))
    return float(np.sum(np.exp(log_p) * (log_p - log_q)))


def check_errors(
    errors: list[LayerError], logits: LogitsError, dtype: ComputeDtype, scheme: str | None
) -> tuple[list[str], list[str]]:
    """What is wrong, and what of quantised parts is more than they usually cost."""
    from vllama_jax.nn.quantized import LLAMA_LAYERS

    if scheme is None:
        return find_exceeded_bounds(errors, logits, BOUNDS[dtype]), []
    model_components = {"vit", *(path.split("/")[0] for path in LLAMA_LAYERS)}
    plain = [error for error in errors if error.component not in model_components]
    costs = [error for error in errors if error.component in model_components]
    return find_exceeded_bounds(plain, None, BOUNDS[dtype]), find_exceeded_bounds(
        costs, logits, QUANTIZED_BOUNDS[scheme]
    )


def find_exceeded_bounds(errors: list[LayerError], logits: LogitsError | None, bounds: Bounds) -> list[str]:
    """What is beyond its bound, the first layer of each part only; a number that is none is beyond any."""
    found: dict[str, str] = {}
    for error in errors:
        if not error.relative <= bounds.relative:
            told = f"{error.component}, {error.layer}: relative error {error.relative:.1e}, above {bounds.relative:.0e}"
            found.setdefault(error.component, told)
    if logits is None:
        return list(found.values())
    if not logits.mean_kl <= bounds.mean_kl:
        found["kl"] = f"logits: mean KL {logits.mean_kl:.1e}, above {bounds.mean_kl:.0e}"
    if not logits.top1 >= bounds.top1:
        found["top1"] = f"logits: the same likeliest token at {logits.top1:.1%} of positions, below {bounds.top1:.1%}"
    return list(found.values())
