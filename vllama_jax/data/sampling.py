"""Choose the records of each step: a pure function of (seed, step), equal on all hosts and after every restart.

All rows of a global batch have the same dataset and kind of media, so that every array of a step has one shape.
"""

import dataclasses

import numpy as np

from vllama_jax.branches import BRANCHES, find_branch
from vllama_jax.data.annotation import Kind
from vllama_jax.data.config import DatasetConfig
from vllama_jax.data.records import Records
from vllama_jax.errors import ConfigError

ROUNDS = 4  # of the cipher that permutes record numbers; grain's default
HOLDOUT_SEED = 0  # constant, so that all runs have the same holdout: stage 2 must not train on that of stage 1


@dataclasses.dataclass(frozen=True)
class Stream:
    """The records of one kind in one dataset, in an order that a seed permutes in each epoch.

    Attributes:
        dataset: The config of the dataset.
        records: Its records directory.
        kind: The kind of media.
        ratio: The stream's share of the steps, relative to the other streams.
    """

    dataset: DatasetConfig
    records: Records
    kind: Kind
    ratio: float

    @property
    def numbers(self) -> range:
        """The record numbers, including the holdout."""
        return self.records.kinds[self.kind]

    @property
    def epoch_length(self) -> int:
        """The number of records that are trained on."""
        return len(self.numbers) - self.dataset.holdout

    def example(self, count: int, seed: int) -> tuple[int, int]:
        """Return the (record, epoch) of example number `count` of a run."""
        epoch, position = divmod(count, self.epoch_length)
        shuffled = _permute(position, self.epoch_length, [seed, epoch, *self._identity])
        return self._record(self.dataset.holdout + shuffled), epoch

    def holdout(self) -> list[int]:
        """Return the numbers of the records that are kept for validation."""
        return [self._record(position) for position in range(self.dataset.holdout)]

    def _record(self, position: int) -> int:
        """Return the record at a position of a fixed permutation, whose first `dataset.holdout` are the holdout."""
        return self.numbers[_permute(position, len(self.numbers), [HOLDOUT_SEED, *self._identity])]

    @property
    def _identity(self) -> tuple[int, int]:
        return int(self.records.digest[:8], 16), ord(self.kind[0])


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a global batch.

    Attributes:
        stream: The stream of all rows.
        examples: (record, epoch) of each row.
    """

    stream: Stream
    examples: list[tuple[int, int]]


class BatchSampler:
    """Chooses the records of each step of a run.

    Attributes:
        streams: The streams of all datasets.
        stream_of: The index in `streams` for each step, int64 [steps].
    """

    def __init__(self, streams: list[Stream], steps: int, batch_size: int, seed: int):
        self.streams = streams
        self._batch_size, self._seed = batch_size, seed
        shares = np.cumsum([stream.ratio for stream in streams])
        draws = np.random.default_rng([seed, 0]).random(steps)  # a longer run starts with the same draws
        self.stream_of = np.searchsorted(shares / shares[-1], draws, side="right")
        self._uses = np.zeros(steps, np.int64)
        for number in range(len(streams)):
            is_used = self.stream_of == number
            self._uses[is_used] = np.arange(is_used.sum())

    def stream(self, step: int) -> Stream:
        """Return the stream of a step."""
        return self.streams[self.stream_of[step]]

    def rows(self, step: int) -> Rows:
        """Return the rows of a step."""
        stream = self.stream(step)
        first = int(self._uses[step]) * self._batch_size
        return Rows(stream, [stream.example(first + row, self._seed) for row in range(self._batch_size)])


def make_streams(datasets: list[tuple[DatasetConfig, Records]], branch: str) -> list[Stream]:
    """Make a stream for each kind of media in each dataset. The streams of a dataset share its ratio by record count.

    Args:
        datasets: The config and the open records directory of each dataset.
        branch: The branch that is trained.

    Raises:
        ConfigError: The branch does not accept a kind of media, or a holdout leaves no records to train on.
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
                    f"train another branch (branch = {others}), or remove the dataset"
                )
            if dataset.holdout >= len(numbers):
                raise ConfigError(
                    f"{dataset.path}: holdout {dataset.holdout} leaves none of its {len(numbers)} {kind} records"
                )
            streams.append(Stream(dataset, records, kind, dataset.ratio * len(numbers) / len(records)))
    return streams


def _permute(position: int, count: int, seed: list[int]) -> int:
    """Return the value at a position of a seeded permutation of range(count), which is not stored."""
    import grain

    mixed_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.experimental.index_shuffle(position, count - 1, mixed_seed, ROUNDS)
