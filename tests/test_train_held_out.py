"""The loss on held-out records: which batches it is of, and that every label counts as much as another."""

from types import SimpleNamespace

import numpy as np
import pytest

from vllama_jax.data.config import DatasetConfig
from vllama_jax.train import validation
from vllama_jax.train.config import TrainConfig, ValidationConfig
from vllama_jax.train.validation import Validation

SIZE = 4


class Stream:
    """Held-out records 0 to `count`, of a dataset."""

    def __init__(self, name: str, count: int):
        self.dataset, self.count = DatasetConfig(path=name, holdout=count), count

    def holdout(self) -> list[int]:
        return list(range(self.count))


class Reader:
    """Keeps what is read. The loss of a record is its number, and it has as many labels."""

    def __init__(self, *streams: Stream):
        self.sampler, self.read_rows = SimpleNamespace(streams=[*streams, Stream("trained", 0)]), []

    def read(self, rows):
        self.read_rows.append((rows.stream.dataset.path, rows.examples))
        arrays = {"numbers": np.array([record for record, _ in rows.examples])}
        return SimpleNamespace(arrays=arrays, problems={}, names=["name"] * SIZE)


@pytest.fixture
def look(monkeypatch, tmp_path):
    """Looks once at held-out streams: what was read, and the line that is said."""
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


def test_validation_batches_cycle_through_the_records(look):
    rows, _ = look(3, Stream("a", 10))
    assert [[record for record, _ in examples] for _, examples in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert {epoch for _, examples in rows for _, epoch in examples} == {0}


def test_validation_streams_alternate_and_continue(look):
    rows, _ = look(5, Stream("a", 8), Stream("b", 3))
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


def test_validation_loss_is_the_mean_over_all_labels(look):
    """Twice 0 + 1 + 2 + 3 and twice 4 + 5 + 6 + 7, of 3 and 4 labels: 8, where the mean of batches would be 7.5."""
    assert look(2, Stream("a", 8))[1] == "step 3: validation loss 8.0000"
