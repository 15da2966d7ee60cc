"""A language model released as the difference to another (Vicuna v0 and v1.1): base + delta, tensor by tensor.

As FastChat's apply_delta computes it: in the delta's dtype, which is float16 in all that were published. Where a delta
has more rows than its base, for tokens that were added, the base's are taken as zeros (FastChat 0.1.10).
"""

import re

import numpy as np

from vllama_jax.convert.redundant import INV_FREQ, equal_up_to_rounding
from vllama_jax.convert.weight_files import Source
from vllama_jax.errors import CheckpointError

EXTENDABLE_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")  # have a row for each token
SAMPLE_SIZE = 2**16  # numbers of a tensor on which the base is checked
MIN_MATCH_FRACTION = (
    0.97  # of them must come back; measured: at least 0.9995 with the right base, at most 0.92 with another
)


def open_delta(base: Source, delta: Source) -> Source:
    """The sum of two language models' files. Raises CheckpointError when they do not have the same tensors."""
    summed = Source(f"{base.label} + {delta.label}", [*base.files, *delta.files], [SummedWeights(base, delta)])
    summed.duplicates = [*base.duplicates, *delta.duplicates]
    summed.notes = [*base.notes, *delta.notes]
    return summed


class SummedWeights:
    """A WeightFile whose tensors are sums, made when they are read."""

    def __init__(self, base: Source, delta: Source):
        self._base, self._delta = base, delta
        buffers = {name for name in base.shapes if re.fullmatch(INV_FREQ, name)}  # kept to be compared, as they are
        added = {name for name in delta.shapes if not re.fullmatch(INV_FREQ, name)}
        self.tensors = {name: (base.shapes[name], base.dtypes[name]) for name in buffers}
        self.tensors |= {name: (delta.shapes[name], delta.dtypes[name]) for name in added}
        self._check_frequencies(delta)
        if unlike := [
            name for name in sorted(self.tensors.keys() | base.shapes.keys()) if not self._has_compatible_shape(name)
        ]:
            held = [
                f"{list(source.shapes[unlike[0]])}" if unlike[0] in source else "missing" for source in (base, delta)
            ]
            raise CheckpointError(
                f"{delta.label}: made for another model than {base.label}: {unlike[0]} is {held[1]} in the delta and "
                f"{held[0]} in the base{f', and {len(unlike) - 1} more differ' if len(unlike) > 1 else ''}"
            )

    def _check_frequencies(self, delta: Source) -> None:
        """A delta's rotary frequencies are the difference, or the base's kept as they were; the base's are used."""
        for name in (name for name in delta.shapes if re.fullmatch(INV_FREQ, name) and name in self._base):
            values = delta.read(name)
            if values.any() and not equal_up_to_rounding(values, self._base.read(name)):
                raise CheckpointError(
                    f"{delta.label}: {name} is neither zero nor that of {self._base.label}; get another delta"
                )

    def _has_compatible_shape(self, name: str) -> bool:
        if name not in self._base or name not in self.tensors:
            return False
        ours, theirs = self._base.shapes[name], self.tensors[name][0]
        grows = name in EXTENDABLE_TENSORS and bool(ours) and ours[1:] == theirs[1:] and ours[0] < theirs[0]
        return ours == theirs or grows

    def read(self, name: str) -> np.ndarray:
        """Raises CheckpointError where the sum shows that the delta was made for another base."""
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
        """Whether sum - base gives the delta back, as it must when the delta is the rounded difference to this base.

        A delta is a multiple of its own base's last digit. Another base has larger numbers in many places, and there
        the delta's last digits are lost.
        """
        if not np.isfinite(summed).all():
            raise CheckpointError(f"{self._delta.label}: {name} + the base's has numbers that are not finite")
        step = max(1, summed.size // SAMPLE_SIZE)
        base, delta, summed = (array.reshape(-1)[::step] for array in (base, delta, summed))
        match_fraction = np.mean(summed - base == delta)
        if match_fraction < MIN_MATCH_FRACTION:
            raise CheckpointError(
                f"{self._delta.label}: made for another base than {self._base.label}: in {name}, "
                f"{1 - match_fraction:.0%} of the sums less the base are not the delta; give the base that it was made "
                "from, as it was published"
            )
