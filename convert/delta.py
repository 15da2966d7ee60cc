"""Language models released as a difference to another model (Vicuna v0 and v1.1): base + delta, tensor by tensor.

The sum is computed as in FastChat's apply_delta: in the delta's dtype, which is float16 in all published deltas. If a
delta has more rows than its base, for added tokens, the base is padded with zeros (FastChat 0.1.10).
"""

import re

import numpy as np

from vllama_jax.convert.redundant import INV_FREQ, equal_up_to_rounding
from vllama_jax.convert.weight_files import Source
from vllama_jax.errors import CheckpointError

EXTENDABLE_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")  # one row for each token of the vocabulary
SAMPLE_SIZE = 2**16  # elements of a tensor that are used to check the base
MIN_MATCH_FRACTION = 0.97  # measured: at least 0.9995 with the right base, at most 0.92 with another


def open_delta(base: Source, delta: Source) -> Source:
    """Open the sum of a base and a delta. Tensors are added when they are read.

    Args:
        base: The language model that the delta was made from.
        delta: The difference to it.

    Returns:
        The tensors of the sum, under the same names.

    Raises:
        CheckpointError: The tensors of the two do not have the same names and shapes.
    """
    summed = Source(f"{base.label} + {delta.label}", [*base.files, *delta.files], [SummedWeights(base, delta)])
    summed.duplicates = [*base.duplicates, *delta.duplicates]
    summed.notes = [*base.notes, *delta.notes]
    return summed


class SummedWeights:
    """A WeightFile whose tensors are base + delta, computed when they are read."""

    def __init__(self, base: Source, delta: Source):
        self._base, self._delta = base, delta
        buffers = {name for name in base.shapes if re.fullmatch(INV_FREQ, name)}  # not added
        added = {name for name in delta.shapes if not re.fullmatch(INV_FREQ, name)}
        self.tensors = {name: (base.shapes[name], base.dtypes[name]) for name in buffers}
        self.tensors |= {name: (delta.shapes[name], delta.dtypes[name]) for name in added}
        self._check_frequencies(delta)
        if differing := [
            name for name in sorted(self.tensors.keys() | base.shapes.keys()) if not self._has_compatible_shape(name)
        ]:
            name = differing[0]
            shapes = [f"{list(source.shapes[name])}" if name in source else "missing" for source in (base, delta)]
            raise CheckpointError(
                f"{delta.label}: made for another model than {base.label}: {name} is {shapes[1]} in the delta and "
                f"{shapes[0]} in the base{f', and {len(differing) - 1} more differ' if len(differing) > 1 else ''}"
            )

    def _check_frequencies(self, delta: Source) -> None:
        """Check that a delta's rotary frequencies are zero or equal to the base's, which are used."""
        for name in (name for name in delta.shapes if re.fullmatch(INV_FREQ, name) and name in self._base):
            values = delta.read(name)
            if values.any() and not equal_up_to_rounding(values, self._base.read(name)):
                raise CheckpointError(
                    f"{delta.label}: {name} is neither zero nor equal to that of {self._base.label}; use another delta"
                )

    def _has_compatible_shape(self, name: str) -> bool:
        if name not in self._base or name not in self.tensors:
            return False
        ours, theirs = self._base.shapes[name], self.tensors[name][0]
        is_extended = name in EXTENDABLE_TENSORS and bool(ours) and ours[1:] == theirs[1:] and ours[0] < theirs[0]
        return ours == theirs or is_extended

    def read(self, name: str) -> np.ndarray:
        """Read base + delta. Raises CheckpointError if the delta was made for another base."""
        if re.fullmatch(INV_FREQ, name):
            return self._base.read(name)
        delta = self._delta.read(name)
        with np.errstate(over="ignore", invalid="ignore"):
            base = self._base.read(name).astype(delta.dtype, copy=False)
            if len(base) < len(delta):
                base = np.concatenate([base, np.zeros((len(delta) - len(base), *delta.shape[1:]), delta.dtype)])
            summed = base + delta
            self._check_base(name, base, delta, summed)
        return summed

    def _check_base(self, name: str, base: np.ndarray, delta: np.ndarray, summed: np.ndarray) -> None:
        """Check that sum - base equals the delta, as it must if the delta is the rounded difference to this base.

        The delta's elements are multiples of the float16 spacing of its own base's elements. Another base has larger
        elements in many places, where the sum loses the last digits of the delta.
        """
        if not np.isfinite(summed).all():
            raise CheckpointError(f"{self._delta.label}: base + delta of {name} is not finite; download both again")
        step = max(1, summed.size // SAMPLE_SIZE)
        base, delta, summed = (array.reshape(-1)[::step] for array in (base, delta, summed))
        match_fraction = np.mean(summed - base == delta)
        if match_fraction < MIN_MATCH_FRACTION:
            raise CheckpointError(
                f"{self._delta.label}: made for another base than {self._base.label}: in {name}, "
                f"(base + delta) - base differs from the delta in {1 - match_fraction:.0%} of the elements; give the "
                "base that it was made from, as it was published"
            )
