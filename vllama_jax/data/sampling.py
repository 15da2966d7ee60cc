"""Which records make up a step: a pure function of (seed, step), the same on every host and after every restart.

All rows of a global batch come from one dataset and are of one kind, so that a step has one shape.
"""

import dataclasses

import numpy as np

from vllama_jax.branches import BRANCHES, find_branch
from vllama_jax.data.annotation import Kind
from vllama_jax.data.config import DatasetConfig
from vllama_jax.data.records import Records
from vllama_jax.errors import ConfigError

ROUNDS = 4  # of the cipher that permutes record numbers; grain's own default
HELD_OUT_SEED = 0  # which records are held out depends on nothing else: stage 2 must not train on stage 1's


@dataclasses.dataclass(frozen=True)
class Stream:
    """The records of one kind of one dataset, in an order that a seed permutes anew in each epoch."""

    dataset: DatasetConfig
    records: Records
    kind: Kind
    ratio: float

    @property
    def numbers(self) -> range:
        return self.records.kinds[self.kind]

    @property
    def epoch_length(self) -> int:
        return len(self.numbers) - self.dataset.holdout

    def example(self, count: int, seed: int) -> tuple[int, int]:
        """(record, epoch) of the sample number `count` of a run."""
        epoch, place = divmod(count, self.epoch_length)
        shuffled = _permuted(place, self.epoch_length, [seed, epoch, *self._identity])
        return self._record(self.dataset.holdout + shuffled), epoch

    def holdout(self) -> list[int]:
        """The records that are kept for validation."""
        return [self._record(place) for place in range(self.dataset.holdout)]

    def _record(self, place: int) -> int:
        """Places below `holdout` are those of the held-out records."""
        return self.numbers[_permuted(place, len(self.numbers), [HELD_OUT_SEED, *self._identity])]

    @property
    def _identity(self) -> tuple[int, int]:
        return int(self.records.digest[:8], 16), ord(self.kind[0])


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a step: where they come from, and for each its (record, epoch)."""

    stream: Stream
    examples: list[tuple[int, int]]


class BatchSampler:
    """The steps of a run. `stream_of[step]` is the number of the stream that the step draws from."""

    def __init__(self, streams: list[Stream], steps: int, batch_size: int, seed: int):
        self.streams = streams
        self._batch_size, self._seed = batch_size, seed
        shares = np.cumsum([stream.ratio for stream in streams])
        draws = np.random.default_rng([seed, 0]).random(steps)  # a longer run begins with the same draws
        self.stream_of = np.searchsorted(shares / shares[-1], draws, side="right")
        self._uses = np.zeros(steps, np.int64)
        for number in range(len(streams)):
            here = self.stream_of == number
            self._uses[here] = np.arange(here.sum())

    def stream(self, step: int) -> Stream:
        """The stream that a step draws from."""
        return self.streams[self.stream_of[step]]

    def rows(self, step: int) -> Rows:
        """The rows of a step."""
        stream = self.stream(step)
        first = int(self._uses[step]) * self._batch_size
        return Rows(stream, [stream.example(first + row, self._seed) for row in range(self._batch_size)])


def make_streams(datasets: list[tuple[DatasetConfig, Records]], branch: str) -> list[Stream]:
    """One for each kind that a dataset holds; they share its ratio by their numbers of records.

    Raises ConfigError for a kind of media that the branch does not accept, and for a held-out part that leaves nothing
    to train on.
    """
    streams = []
    for dataset, records in datasets:
        for kind, numbers in records.kinds.items():
            if not numbers:
                continue
            if kind not in find_branch(branch).media:
                others = " or ".join(repr(name) for name, other in BRANCHES.items() if kind in other.media)
                raise ConfigError(
                    f"{dataset.path}: has {kind} records, which the {branch} branch does not accept; "
                    f"train another one (branch = {others}), or leave it out"
                )
            if dataset.holdout >= len(numbers):
                raise ConfigError(
                    f"{dataset.path}: holdout {dataset.holdout} leaves none of its {len(numbers)} {kind} records"
                )
            streams.append(Stream(dataset, records, kind, dataset.ratio * len(numbers) / len(records)))
    return streams


def _permuted(place: int, count: int, seed: list[int]) -> int:
    """Where a seeded permutation of `count` numbers takes `place`, without the permutation being stored."""
    import grain

    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.experimental.index_shuffle(place, count - 1, mixed, ROUNDS)
