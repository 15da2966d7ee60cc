"""Validation loss: which batches it uses, and that all labels have the same weight."""

from types import SimpleNamespace

import numpy as np
import pytest

from vllama_jax.data.config import DatasetConfig
from vllama_jax.train import validation
from vllama_jax.train.config import TrainConfig, ValidationConfig
from vllama_jax.train.validation import Validation

SIZE = 4


class Stream:
    """The validation records 0 to `count` of a dataset."""

    def __init__(self, name: str, count: int):
        self.dataset, self.count = DatasetConfig(path=name, holdout=count), count

    def holdout(self) -> list[int]:
        return list(range(self.count))


class Reader:
    """A reader that records its calls. The loss of a record is its number, and so is its number of labels."""

    rows = range(SIZE)

    def __init__(self, *streams: Stream):
        self.sampler, self.read_rows = SimpleNamespace(streams=[*streams, Stream("trained", 0)]), []

    def read(self, rows):
        self.read_rows.append((rows.stream.dataset.path, rows.examples))
        arrays = {"numbers": np.array([record for record, _ in rows.examples])}
        return SimpleNamespace(arrays=arrays, masked=[])


@pytest.fixture
def run_validation(monkeypatch, tmp_path):
    """Run validation once; return the batches that were read, and the reported line."""
    monkeypatch.setattr(validation, "shard_batch", lambda arrays, plan: arrays)

    def run(batches: int, *streams: Stream) -> tuple[list, str]:
        datasets = tuple(stream.dataset for stream in streams)
        cfg = ValidationConfig(interval_steps=1, num_batches=batches)
        config = TrainConfig(model="m", datasets=datasets, steps=9, batch_size=SIZE, validation=cfg)
        reader = Reader(*streams)
        plan = SimpleNamespace(config=config, reader=reader, abstract_model=None, loss=None)
        one = Validation(plan, tmp_path, lambda *_: None)
        one._evaluate = lambda weights, frozen, batch: (batch["numbers"].sum() * 2.0, (batch["numbers"] > 0).sum())
        (line,) = one.run(3, {}, {})
        assert one.journal.read()[-1]["step"] == 3
        return reader.read_rows, line

    return run


def test_validation_batches_cycle_through_the_records(run_validation):
    rows, _ = run_validation(3, Stream("a", 10))
    assert [[record for record, _ in examples] for _, examples in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert {epoch for _, examples in rows for _, epoch in examples} == {0}


def test_validation_streams_alternate_and_continue(run_validation):
    rows, _ = run_validation(5, Stream("a", 8), Stream("b", 3))
    assert [name for name, _ in rows] == ["a", "b", "a", "b", "a"]
    assert [[record for record, _ in examples] for name, examples in rows if name == "a"] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [0, 1, 2, 3],
    ]
    assert [[record for record, _ in examples] for name, examples in rows if name == "b"] == [
        [0, 1, 2, 0],
        [1, 2, 0, 1],
    ]


def test_validation_loss_is_the_mean_over_all_labels(run_validation):
    """Two times 0 + 1 + 2 + 3 and 4 + 5 + 6 + 7, with 3 and 4 labels: 8; the mean over batches would be 7.5."""
    assert run_validation(2, Stream("a", 8))[1] == "step 3: validation loss 8.0000"
