"""The records of each step: what their order depends on, and that batches are consecutive."""

import dataclasses
from pathlib import Path

import pytest

from vllama_jax.data.config import DatasetConfig
from vllama_jax.data.records import Records, record_ranges
from vllama_jax.data.sampling import BatchSampler, Stream, make_streams
from vllama_jax.errors import ConfigError


def records_of(digest: str = "0123456789abcdef", **counts: int) -> Records:
    return Records(Path("records"), "jsonl", record_ranges(counts), digest)


def stream_of(count: int = 40, holdout: int = 0, kind: str = "video", **options) -> Stream:
    dataset = DatasetConfig(path="d", holdout=holdout)
    return Stream(dataset, records_of(**{kind: count}, **options), kind, 1.0)


def epoch(stream: Stream, seed: int = 0, number: int = 0) -> list[int]:
    """Return the records of an epoch, in order."""
    length = stream.epoch_length
    drawn = [stream.example(number * length + place, seed) for place in range(length)]
    assert {found for _, found in drawn} == {number}
    return [record for record, _ in drawn]


@pytest.mark.slow
def test_order_depends_only_on_seed_epoch_dataset_and_media_type():
    stream = stream_of()
    orders = [
        epoch(stream),
        epoch(stream, seed=1),
        epoch(stream, number=1),
        epoch(stream_of(digest="f" * 16)),
        epoch(stream_of(kind="image")),
    ]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    moved = dataclasses.replace(stream, dataset=dataclasses.replace(stream.dataset, path="moved", ratio=3.0))
    assert epoch(moved) == epoch(stream)
    assert list(range(40)) not in orders


def test_batches_continue_through_an_epoch_and_into_the_next():
    stream = stream_of(40)
    order = BatchSampler([stream], steps=10, batch_size=8, seed=3)
    rows = [example for step in range(10) for example in order.rows(step).examples]
    assert rows == [(record, 0) for record in epoch(stream, 3)] + [(record, 1) for record in epoch(stream, 3, 1)]


def test_each_of_two_streams_continues():
    streams = [stream_of(30), stream_of(50, digest="a" * 16)]
    order = BatchSampler(streams, steps=16, batch_size=5, seed=0)
    for number, stream in enumerate(streams):
        steps = [step for step in range(16) if order.stream_of[step] == number]
        assert steps
        drawn = [example for step in steps for example in order.rows(step).examples]
        assert drawn == [stream.example(count, 0) for count in range(len(drawn))]
        assert all(order.rows(step).stream is stream for step in steps)


def test_steps_do_not_depend_on_the_length_of_the_run_but_on_the_seed():
    streams = [stream_of(30), stream_of(50, digest="a" * 16)]
    short, long, other = (BatchSampler(streams, steps, 4, seed) for steps, seed in [(20, 5), (60, 5), (20, 6)])
    assert [short.rows(step) for step in range(20)] == [long.rows(step) for step in range(20)]
    assert short.stream_of.tolist() != other.stream_of.tolist()


def test_the_holdout_depends_only_on_the_dataset():
    few, more = stream_of(holdout=5).holdout(), stream_of(holdout=9).holdout()
    assert more[:5] == few
    assert len(set(more)) == 9
    other = stream_of(holdout=9, digest="f" * 16).holdout()
    assert set(other) != set(more)
    assert sorted(more) != list(range(9))


def test_a_dataset_needs_a_record_that_is_not_holdout():
    def streams(holdout: int, branch: str = "vision", **counts: int) -> list[Stream]:
        return make_streams([(DatasetConfig(path="d", holdout=holdout), records_of(**counts))], branch)

    assert [stream.epoch_length for stream in streams(3, video=4, image=9)] == [1, 6]
    with pytest.raises(ConfigError, match="d: holdout 4 leaves none of its 4 video records"):
        streams(4, video=4, image=9)
    with pytest.raises(ConfigError, match="d: has audio records, which the vision branch does not accept"):
        streams(0, video=4, audio=2)
    assert [stream.kind for stream in streams(0, "audio", video=4, audio=2)] == ["video", "audio"]


def test_media_types_share_a_ratio_by_their_numbers_of_records():
    datasets = [
        (DatasetConfig(path="a", ratio=4.0), records_of(video=4, image=12)),
        (DatasetConfig(path="b"), records_of(image=5)),
    ]
    streams = make_streams(datasets, "vision")
    assert [stream.ratio for stream in streams] == [1.0, 3.0, 1.0]
    steps = BatchSampler(streams, steps=5000, batch_size=1, seed=0).stream_of
    counts = [int((steps == number).sum()) for number in range(3)]
    assert counts == pytest.approx([1000, 3000, 1000], abs=140)  # four standard deviations
