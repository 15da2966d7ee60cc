"""Tensors that a model does not need, because they are computed or another file has them too.

Their values are compared with the expected ones: a file with other values belongs to another model.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np

from vllama_jax.config import LlamaConfig, VideoLlamaConfig
from vllama_jax.convert import imagebind
from vllama_jax.convert.weight_files import Source

INV_FREQ = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
STORED_INV_FREQ = rf"(llama_model\.)?{INV_FREQ}"  # in LLaMA's files and in Video-LLaMA's checkpoints
POSITION_IDS_NAME = r".*\.embeddings\.position_ids"
IMAGEBIND_PREFIX = "audio_encoder."  # of ImageBind's tensors in a checkpoint of the audio branch
FLOAT_DTYPES = ("float64", "float32", "bfloat16", "float16")

Candidates = Callable[[], list[np.ndarray]]  # returns the values that a tensor may have


def get_reason(name: str) -> str:
    """Return the reason why a redundant tensor is not used, for the user."""
    if re.fullmatch(STORED_INV_FREQ, name):
        return "a buffer: rotary frequencies, equal to the computed ones"
    if re.fullmatch(POSITION_IDS_NAME, name):
        return "a buffer: position ids 0, 1, 2, …"
    if name.startswith(IMAGEBIND_PREFIX):
        return "a buffer or weight of ImageBind, equal to that of --imagebind"
    return "the vision branch, equal to that of --vl"


def find_redundant(cfg: VideoLlamaConfig, sources: Mapping[str, Source], source: Source) -> dict[str, Candidates]:
    """Find the redundant tensors of a file.

    Args:
        cfg: The model's config.
        sources: All files by file type.
        source: The file to search.

    Returns:
        For each redundant tensor, a function that returns the values it may have.
    """
    found: dict[str, Candidates] = {}
    in_imagebind = _imagebind_values(cfg, sources)
    vision = sources.get("vl") if sources.get("al") is source and sources.get("vl") is not source else None
    for name, shape in source.shapes.items():
        if re.fullmatch(STORED_INV_FREQ, name):
            found[name] = functools.partial(_inv_freqs, cfg)
        elif re.fullmatch(POSITION_IDS_NAME, name):
            found[name] = functools.partial(_position_ids, shape)
        elif name.startswith(IMAGEBIND_PREFIX) and (values := in_imagebind.get(name.removeprefix(IMAGEBIND_PREFIX))):
            found[name] = values
        elif vision and name in vision and name.startswith(("video_", "llama_proj.")):
            found[name] = functools.partial(_tensor, vision, name)
    return found


def _inv_freqs(cfg: VideoLlamaConfig) -> list[np.ndarray]:
    from vllama_jax.nn.llama import rope_frequencies

    return [rope_frequencies(llama) for llama in _with_and_without_scaling(cfg)]


def _position_ids(shape: Sequence[int]) -> list[np.ndarray]:
    return [np.arange(math.prod(shape))]


def _tensor(source: Source, name: str) -> list[np.ndarray]:
    return [source.read(name)]


def _with_and_without_scaling(cfg: VideoLlamaConfig) -> Sequence[LlamaConfig]:
    """Return the configs whose frequencies a file may contain.

    For linear scaling, transformers 4.31 divides positions by the factor and stores unscaled frequencies.
    """
    linear = cfg.llama.rope_scaling and cfg.llama.rope_scaling.kind == "linear"
    return [cfg.llama, dataclasses.replace(cfg.llama, rope_scaling=None)] if linear else [cfg.llama]


def _imagebind_values(cfg: VideoLlamaConfig, sources: Mapping[str, Source]) -> dict[str, Candidates]:
    """Return ImageBind's tensors by name: those of its file, or its constant buffers."""
    values: dict[str, Candidates] = {}
    for name, value in imagebind.buffers(cfg.imagebind).items() if cfg.imagebind else ():
        values[name] = functools.partial(list, (value,))
    if source := sources.get("imagebind"):
        values |= {name: functools.partial(_tensor, source, name) for name in source.shapes}
    return values


def differs(source: Source, name: str, candidates: Candidates) -> bool:
    """Whether a tensor has none of the values that it may have."""
    if source.dtypes[name] not in (*FLOAT_DTYPES, "int64", "int32"):
        return True
    stored = source.read(name)
    return not any(equal_up_to_rounding(stored, value) for value in candidates())


def equal_up_to_rounding(stored: np.ndarray, computed: np.ndarray) -> bool:
    """Whether two arrays are equal up to one unit in the last place of the dtype that the stored one was rounded to.

    This is the stored dtype, or float16 or bfloat16 if these represent all stored values exactly: such a model was cast
    to a wider dtype after it was rounded.
    """
    stored, computed = stored.ravel(), computed.ravel()
    if stored.size != computed.size:
        return False
    if stored.dtype.kind in "iu":
        return np.array_equal(stored, computed)
    halves = [dtype for dtype in (np.dtype("float16"), np.dtype("bfloat16")) if dtype != stored.dtype]
    with np.errstate(over="ignore"):
        roundings = [stored.dtype, *(half for half in halves if np.array_equal(stored.astype(half), stored))]
        return any(_close(stored, computed.astype(rounding), rounding) for rounding in roundings)


def _close(stored: np.ndarray, computed: np.ndarray, rounding: np.dtype) -> bool:
    limits = ml_dtypes.finfo(rounding)
    relative = max(float(limits.eps), 1e-5)  # float32 powers differ in the last digits between machines
    absolute = float(limits.smallest_subnormal)
    return np.allclose(stored.astype(np.float64), computed.astype(np.float64), rtol=relative, atol=absolute)
