"""Match the tensors of weight files with the weights of a model.

Every weight needs its tensors exactly once and in the right shapes. Tensors that are not used are an error, except
those that are known to be unnecessary.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from vllama_jax.config import VideoLlamaConfig
from vllama_jax.convert import redundant
from vllama_jax.convert.components import FILE_SPECS
from vllama_jax.convert.rules import Rule
from vllama_jax.convert.weight_files import Source
from vllama_jax.errors import CheckpointError
from vllama_jax.io.prefetch import map_in_order
from vllama_jax.nn.network import abstract_network

WEIGHT_DTYPES = ("float64", "float32", "bfloat16", "float16")
MAX_REPORTED_PROBLEMS = 30
LAYER_READERS = 2  # threads; 1.3 times the speed of one from safetensors, 1.9 from .bin; each has a layer in memory


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A weight of the model that is converted from a file.

    Attributes:
        rule: The rule that makes it.
        source: The file that has its tensors.
        shape: Its shape in the model.
    """

    rule: Rule
    source: Source
    shape: tuple[int, ...]

    @property
    def target(self) -> str:
        """The path of the weight."""
        return self.rule.target

    @property
    def dtype(self) -> np.dtype:
        """The dtype of its tensors in the file; if they differ, one that represents all their values."""
        dtypes = {self.source.dtypes[name] for names in self.rule.names() for name in names}
        if dtypes >= {"bfloat16", "float16"}:
            dtypes = dtypes - {"bfloat16", "float16"} | {"float32"}
        return np.result_type(*map(np.dtype, dtypes))

    def blocks(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Yield the rows of the weight in order, one layer at a time, as C-contiguous arrays.

        `LAYER_READERS` layers are read concurrently. Raises CheckpointError if a value is too large for `dtype`.
        """
        return map_in_order(lambda names: self._block(names, dtype), self.rule.names(), LAYER_READERS)

    def _block(self, names: tuple[str, ...], dtype: np.dtype) -> np.ndarray:
        block = self.rule.transform.to_jax(*(self.source.read(name) for name in names))
        block = cast(np.ascontiguousarray(block), dtype, f"{self.source.label}: {self.target}")
        return block if self.rule.layers is None else block[None]


def cast(block: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """Cast to another dtype. Raises CheckpointError, which starts with `where`, if a value is too large for it."""
    try:
        with np.errstate(over="raise"):
            if dtype == np.float16 and block.dtype.name == "bfloat16":
                block = block.astype(np.float32)  # numpy reports overflow for float32, not for bfloat16
            return block.astype(dtype, copy=False)
    except FloatingPointError as error:
        raise CheckpointError(f"{where} has values too large for {dtype.name}; use bfloat16") from error


def abstract_shapes(cfg: VideoLlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all weights of a model by path, without creating arrays."""
    from flax import nnx

    state = nnx.state(abstract_network(cfg, "float32"))
    return {"/".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(state)}


def rule_tables(
    cfg: VideoLlamaConfig, file_types: Iterable[str], other_file_types: Iterable[str] = ()
) -> dict[str, list[Rule]]:
    """Return the rule table of each file type that applies to a model.

    The projection of a vision-language checkpoint takes precedence over MiniGPT-4's.

    Args:
        cfg: The model's config.
        file_types: File types, keys of `FILE_SPECS`.
        other_file_types: File types that model directories or runs provide.
    """
    file_types = list(file_types)
    has_projection = "vl" in (*file_types, *other_file_types)
    return {
        file_type: FILE_SPECS[file_type].rules(cfg)
        for file_type in file_types
        if FILE_SPECS[file_type].applies(cfg) and (file_type != "minigpt4" or not has_projection)
    }


Problem = tuple[str, str]  # the type of problem, such as "missing in", and the file and tensor


def match_weights(
    cfg: VideoLlamaConfig, sources: Mapping[str, Source], other_file_types: Iterable[str] = ()
) -> tuple[list[Leaf], dict[str, int]]:
    """Match the tensors of files with the weights of a model.

    Args:
        cfg: The model's config.
        sources: The files by file type.
        other_file_types: File types that model directories or runs provide.

    Returns:
        The weights that the files provide, and the number of tensors that are not used, by reason.

    Raises:
        CheckpointError: Tensors are missing, duplicate, unexpected, or of the wrong shape or dtype. The message lists
            them.
    """
    shapes = abstract_shapes(cfg)
    leaves: list[Leaf] = []
    problems: list[Problem] = []
    used_rules = rule_tables(cfg, sources, other_file_types)
    for file_type, rules in used_rules.items():
        for rule in rules:
            problems += _find_problems(rule, sources[file_type], shapes[rule.target])
            leaves.append(Leaf(rule, sources[file_type], shapes[rule.target]))
    left_out, unexpected = _find_unused(cfg, sources, used_rules)
    for source in dict.fromkeys(sources.values()):
        problems += [("duplicate in", f"{source.label}: {name}") for name in sorted(source.duplicates)]
    problems += unexpected
    if problems := problems or _find_differing(cfg, sources):
        raise CheckpointError("\n  ".join(["the files do not make a model:", *_summarize_problems(problems)]))
    return leaves, left_out


def _summarize_problems(problems: Sequence[Problem]) -> list[str]:
    """Return a line for each problem; if there are too many, some of each type and the number of the others."""
    types = list(dict.fromkeys(problem_type for problem_type, _ in problems))
    limit, lines = MAX_REPORTED_PROBLEMS // len(types), []
    for problem_type in types:
        found = [f"{problem_type} {where}" for other_type, where in problems if other_type == problem_type]
        if len(found) > limit:
            found[limit - 1 :] = [f"… and {len(found) - limit + 1} more {problem_type}"]
        lines += found
    return lines


def _find_problems(rule: Rule, source: Source, shape: tuple[int, ...]) -> Iterator[Problem]:
    """Yield the problems of the tensors that a rule needs."""
    expected = rule.source_shapes(shape)
    for names in rule.names():
        for name, needed in zip(names, expected, strict=True):
            where = f"{source.label}: {name}"
            if name not in source:
                yield "missing in", f"{where} {list(needed)}"
            elif source.shapes[name] != needed:
                yield "shape mismatch in", f"{where} is {list(source.shapes[name])}, but {list(needed)} is needed"
            elif source.dtypes[name] not in WEIGHT_DTYPES:
                yield "wrong dtype in", f"{where} is {source.dtypes[name]}, not {', '.join(WEIGHT_DTYPES)}"


def _find_unused(
    cfg: VideoLlamaConfig, sources: Mapping[str, Source], used_rules: Mapping[str, Sequence[Rule]]
) -> tuple[dict[str, int], list[Problem]]:
    """Return the number of known unused tensors by reason, and the unexpected tensors as problems."""
    counts: dict[str, int] = {}
    unexpected = []
    for source in dict.fromkeys(sources.values()):  # one file may be of several types
        file_types = [file_type for file_type in sources if sources[file_type] is source]
        rules = [rule for file_type in file_types for rule in used_rules.get(file_type, [])]
        used = {name for rule in rules for names in rule.names() for name in names}
        unused_tensors = {} if rules else {".*": "--vl has its own projection"}
        for file_type in file_types:
            unused_tensors |= FILE_SPECS[file_type].unused_tensors(cfg)
        known = redundant.find_redundant(cfg, sources, source)
        for name in sorted(source.shapes.keys() - used):
            matching = (reason for pattern, reason in unused_tensors.items() if re.fullmatch(pattern, name))
            reason = redundant.get_reason(name) if name in known else next(matching, None)
            if reason is None:
                unexpected.append(("unexpected in", f"{source.label}: {name} {list(source.shapes[name])}"))
            else:
                counts[f"{source.label}: {reason}"] = counts.get(f"{source.label}: {reason}", 0) + 1
    return counts, unexpected


def _find_differing(cfg: VideoLlamaConfig, sources: Mapping[str, Source]) -> list[Problem]:
    """Return the redundant tensors whose values differ from the expected ones."""
    return [
        ("differs in", f"{source.label}: {name} has other values than these files imply; it belongs to another model")
        for source in dict.fromkeys(sources.values())
        for name, candidates in redundant.find_redundant(cfg, sources, source).items()
        if redundant.differs(source, name, candidates)
    ]
