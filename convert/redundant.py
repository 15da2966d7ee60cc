"""Tensors that files hold and a model does not need, because they are computed or come from another file.

Each is compared before it is left out: a file with other values was made for another model.
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
STORED_INV_FREQ = rf"(llama_model\.)?{INV_FREQ}"  # as LLaMA's own files and Video-LLaMA's checkpoints name it
POSITION_IDS_NAME = r".*\.embeddings\.position_ids"
IMAGEBIND_PREFIX = "audio_encoder."  # before ImageBind's names in a checkpoint of the audio branch
FLOAT_DTYPES = ("float64", "float32", "bfloat16", "float16")

Values = Callable[[], list[np.ndarray]]  # those that a tensor may have, when they are needed


def reason(name: str) -> str:
    """Why a tensor that `expected` knows is left out, for the user."""
    if re.fullmatch(STORED_INV_FREQ, name):
        return "a buffer: rotary frequencies are computed, and were compared"
    if re.fullmatch(POSITION_IDS_NAME, name):
        return "a buffer: 0, 1, 2, …, as was checked"
    if name.startswith(IMAGEBIND_PREFIX):
        return "a buffer or weight of ImageBind, equal to what --imagebind gives"
    return "the vision branch, equal to what --vl gives"


def expected(cfg: VideoLlamaConfig, sources: Mapping[str, Source], source: Source) -> dict[str, Values]:
    """The redundant tensors of a file, each with the values that it must have one of."""
    found: dict[str, Values] = {}
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
    """transformers 4.31 divides positions by a linear scaling's factor, and stores the frequencies as they were."""
    linear = cfg.llama.rope_scaling and cfg.llama.rope_scaling.kind == "linear"
    return [cfg.llama, dataclasses.replace(cfg.llama, rope_scaling=None)] if linear else [cfg.llama]


def _imagebind_values(cfg: VideoLlamaConfig, sources: Mapping[str, Source]) -> dict[str, Values]:
    """What ImageBind has, by its own names: its file's tensors, or else the buffers that are known."""
    values: dict[str, Values] = {}
    for name, value in imagebind.buffers(cfg.imagebind).items() if cfg.imagebind else ():
        values[name] = functools.partial(list, (value,))
    if source := sources.get("imagebind"):
        values |= {name: functools.partial(_tensor, source, name) for name in source.shapes}
    return values


def differing(source: Source, name: str, values: Values) -> bool:
    """Whether a tensor has none of the values that it must have one of."""
    if source.dtypes[name] not in (*FLOAT_DTYPES, "int64", "int32"):
        return True
    stored = source.read(name)
    return not any(equal_up_to_rounding(stored, value) for value in values())


def equal_up_to_rounding(stored: np.ndarray, computed: np.ndarray) -> bool:
    """Equal but for the rounding that the stored values went through, to a unit in the last place.

    That is their own dtype's, or a half one's where all of them have its digits: of a model that was widened again.
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
    relative = max(float(limits.eps), 1e-5)  # powers in float32 differ in their last digits from machine to machine
    absolute = float(limits.smallest_subnormal)
    return np.allclose(stored.astype(np.float64), computed.astype(np.float64), rtol=relative, atol=absolute)
