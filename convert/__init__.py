"""Weights in PyTorch's layouts → a model directory. The only package that knows PyTorch names."""

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllama_jax import checkpoint
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.errors import CheckpointError, ConfigError

from . import llama
from .infer import model_config
from .pieces import PIECES, check_kind
from .rules import Rule
from .sources import Source, open_file, open_llama

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One weight of ours and where it comes from."""

    rule: Rule
    source: Source
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*(self.source.dtypes[name] for names in self.rule.names() for name in names))

    def blocks(self) -> Iterator[np.ndarray]:
        """The weight's rows in order, read one at a time."""
        for names in self.rule.names():
            block = self.rule.transform.to_jax(*(self.source.read(name) for name in names))
            yield block if self.rule.layers is None else block[None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion in which everything was found and fits, before a byte of it is read."""

    config: VideoLlamaConfig
    leaves: list[Leaf]
    left_out: dict[str, int]  # reason → how many tensors
    pieces: dict[str, Source]
    llama_directory: Path


def plan(
    *,
    llama_directory: str | Path,
    files: Mapping[str, str | Path | None],
    config: Mapping[str, Any] | None = None,
    template: str = "vicuna",
) -> Plan:
    """Checks that the files make a model: every weight found once, of the right shape, and nothing left over.

    files: paths by kind, as PIECES names them; eva_vit and blip2 must be there. config: any part of a model config.
    Raises CheckpointError listing all that is missing, misshapen or not used; ConfigError for what `config` says.
    """
    from vllama_jax.text.prompts import find_template
    from vllama_jax.text.tokenizer import check_vocabulary, load_tokenizer

    find_template(template)
    pieces = {kind: open_file(path) for kind, path in files.items() if path is not None}
    pieces["llama"] = open_llama(llama_directory)
    for kind, source in pieces.items():
        check_kind(kind, source)
    if "al" in pieces and "imagebind" not in pieces:
        raise ConfigError("--al needs --imagebind: the audio branch hears through ImageBind")
    cfg = model_config(pieces, Path(llama_directory), config or {}, template)
    check_vocabulary(load_tokenizer(Path(llama_directory)), cfg.llama.vocab_size)
    leaves, problems = _match(cfg, pieces)
    left_out, unused = _left_out(cfg, pieces)
    if problems or unused:
        raise CheckpointError("the files do not make a model:\n  " + "\n  ".join(problems + unused))
    _check_buffers(cfg, pieces)
    return Plan(cfg, leaves, left_out, pieces, Path(llama_directory))


def convert(plan: Plan, out: str | Path, *, dtype: str | None = None, progress: Progress = lambda done: None) -> None:
    """Writes the model directory that `plan` describes; `out` appears when it is whole.

    dtype: of the weights on disk; each one's own unless given. progress is called with the bytes written since.
    Raises CheckpointError when `out` exists or cannot be written.
    """
    import ml_dtypes  # noqa: F401  (numpy learns "bfloat16")

    with checkpoint.new_directory(Path(out)) as directory:
        params = directory / "params"
        written = {}
        for leaf in sorted(plan.leaves, key=lambda leaf: leaf.rule.target):
            target = np.dtype(dtype) if dtype else leaf.dtype
            blocks = _counted(leaf.blocks(), target, progress)
            written[leaf.rule.target] = checkpoint.write_leaf(params, leaf.rule.target, leaf.shape, target, blocks)
        checkpoint.finish_params(params, written)
        _copy_tokenizer(plan.llama_directory, directory / "tokenizer")
        checkpoint.write_config(directory, plan.config)
        files = {kind: [_described(file) for file in source.files] for kind, source in plan.pieces.items()}
        checkpoint.write_manifest(directory, files, written)


def bytes_to_write(plan: Plan, dtype: str | None = None) -> int:
    return sum(int(np.prod(leaf.shape)) * np.dtype(dtype or leaf.dtype).itemsize for leaf in plan.leaves)


def abstract_shapes(cfg: VideoLlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the model by its path, without making one."""
    from flax import nnx

    from vllama_jax.nn.video_llama import VideoLlama

    model = nnx.eval_shape(lambda: VideoLlama(cfg, rngs=nnx.Rngs(0)))
    return {"/".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(nnx.state(model))}


def tables(cfg: VideoLlamaConfig, kinds: Sequence[str]) -> dict[str, list[Rule]]:
    """The rules of each kind of file. A vision-language checkpoint's projection wins over MiniGPT-4's."""
    found = {kind: PIECES[kind].rules(cfg) for kind in kinds}
    if "vl" in found and "minigpt4" in found:
        del found["minigpt4"]
    return found


def _match(cfg: VideoLlamaConfig, pieces: Mapping[str, Source]) -> tuple[list[Leaf], list[str]]:
    """Every weight of the model that one of the pieces gives, and what is wrong with them."""
    shapes, leaves, problems = abstract_shapes(cfg), [], []
    for kind, rules in tables(cfg, list(pieces)).items():
        source = pieces[kind]
        for rule in rules:
            expected = rule.source_shapes(shapes[rule.target])
            for names in rule.names():
                for name, shape in zip(names, expected, strict=True):
                    if name not in source:
                        problems.append(f"missing in {source.label}: {name} {list(shape)}")
                    elif source.shapes[name] != shape:
                        problems.append(
                            f"misshapen in {source.label}: {name} is {list(source.shapes[name])}, "
                            f"and {list(shape)} is needed"
                        )
            leaves.append(Leaf(rule, source, shapes[rule.target]))
    return leaves, problems


def _left_out(cfg: VideoLlamaConfig, pieces: Mapping[str, Source]) -> tuple[dict[str, int], list[str]]:
    """Known extras, counted by reason, and tensors that nothing knows."""
    used_rules = tables(cfg, list(pieces))
    reasons: dict[str, int] = {}
    unused = []
    for kind, source in pieces.items():
        used = {name for rule in used_rules.get(kind, []) for names in rule.names() for name in names}
        extras = PIECES[kind].extras(cfg)
        if kind not in used_rules:
            extras = {".*": "--vl has its own projection"}
        for name in source.shapes.keys() - used:
            reason = next((why for pattern, why in extras.items() if re.fullmatch(pattern, name)), None)
            if reason is None:
                unused.append(f"not used from {source.label}: {name} {list(source.shapes[name])}")
            else:
                reasons[f"{source.label}: {reason}"] = reasons.get(f"{source.label}: {reason}", 0) + 1
    return reasons, sorted(unused)


def _check_buffers(cfg: VideoLlamaConfig, pieces: Mapping[str, Source]) -> None:
    """Raises CheckpointError where a LLaMA's stored rotary frequencies are not those that its config.json gives."""
    from vllama_jax.nn.llama import rope_frequencies

    computed = rope_frequencies(cfg.llama)
    for kind, pattern in (("llama", llama.INV_FREQ), ("vl", rf"llama_model\.{llama.INV_FREQ}")):
        source = pieces.get(kind)
        for name in [] if source is None else source.shapes:
            if re.fullmatch(pattern, name) and not llama.same_frequencies(source.read(name), computed):
                raise CheckpointError(
                    f"{source.label}: {name} is not what config.json's rotary settings give; "
                    "the config.json belongs to another model"
                )


def _counted(blocks: Iterator[np.ndarray], dtype: np.dtype, progress: Progress) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block
        progress(block.size * dtype.itemsize)


def _copy_tokenizer(llama_directory: Path, out: Path) -> None:
    from vllama_jax.text.tokenizer import tokenizer_files

    out.mkdir()
    for file in tokenizer_files(llama_directory):
        shutil.copyfile(file, out / file.name)


def _described(file: Path) -> dict[str, Any]:
    return {"name": file.name, "size": file.stat().st_size}
