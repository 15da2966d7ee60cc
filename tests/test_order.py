"""The records of a step and of the holdout, compared with independently written rules."""

import collections
import dataclasses

import numpy as np
import pytest

from vllama_jax.config import tiny
from vllama_jax.data.annotation import Annotation
from vllama_jax.data.config import DataConfig, DatasetConfig
from vllama_jax.data.pipeline import BatchReader, DecodedMedia
from vllama_jax.data.records import record_ranges
from vllama_jax.data.sampling import BatchSampler, Stream, make_streams
from vllama_jax.errors import ConfigError
from vllama_jax.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class FakeRecords:
    """The attributes of records that the sampler reads: the number of records of each media type, and their digest."""

    counts: dict[str, int]
    digest: str = "0123456789abcdef"

    @property
    def kinds(self) -> dict[str, range]:
        return record_ranges(self.counts)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def annotation(self, number: int) -> Annotation:
        return Annotation(str(number), "video", (("", "a"),))


def streams_of(*datasets: tuple[float, int, dict[str, int]], branch: str = "audio") -> list[Stream]:
    """Make streams of datasets given as (ratio, held out, counts)."""
    pairs = [
        (
            DatasetConfig(path=f"records{number}", ratio=ratio, holdout=holdout),
            FakeRecords(counts, f"{number + 1:08x}"),
        )
        for number, (ratio, holdout, counts) in enumerate(datasets)
    ]
    return make_streams(pairs, branch)


def epoch(stream: Stream, number: int, seed: int = 3) -> list[int]:
    """Return the records of an epoch in their order."""
    length = len(stream.numbers) - stream.dataset.holdout
    examples = [stream.example(count, seed) for count in range(number * length, (number + 1) * length)]
    assert {where for _, where in examples} == {number}
    return [record for record, _ in examples]


@pytest.mark.parametrize("holdout", [0, 1, 5, 22])
@pytest.mark.parametrize("kind", ["video", "image", "audio"])
def test_an_epoch_and_the_holdout_are_all_records_once(kind, holdout):
    (stream,) = [one for one in streams_of((1.0, holdout, {"video": 23, "image": 31, "audio": 29})) if one.kind == kind]
    numbers = {"video": range(23), "image": range(23, 54), "audio": range(54, 83)}[kind]
    kept = stream.holdout()
    assert len(kept) == len(set(kept)) == holdout
    for number in range(3):
        trained = epoch(stream, number)
        assert len(trained) == len(set(trained)) == len(numbers) - holdout
        assert set(trained).isdisjoint(kept)
        assert {*trained, *kept} == set(numbers)


def test_epochs_and_seeds_differ_in_order_but_share_the_holdout():
    """Stage 2 with another seed must not train on stage 1's validation records."""
    (stream,) = streams_of((1.0, 8, {"video": 100}))
    orders = [epoch(stream, 0), epoch(stream, 1), epoch(stream, 2), epoch(stream, 0, seed=4)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(order != sorted(order) for order in orders)
    assert len({frozenset(order) for order in orders}) == 1
    assert stream.holdout() != sorted(stream.holdout()), "records side by side are alike"
    shorter, longer = (next(iter(streams_of((1.0, holdout, {"video": 100})))).holdout() for holdout in (5, 20))
    assert longer[:5] == shorter, "holding out more keeps those that were held out"


def test_the_holdout_depends_only_on_records_and_media_type():
    same = {"video": 60, "image": 60}
    first, second = streams_of((1.0, 10, same))
    other = streams_of((1.0, 10, same), (1.0, 10, same))[2]
    holdouts = [[record - stream.numbers.start for record in stream.holdout()] for stream in (first, second, other)]
    assert len({tuple(place) for place in holdouts}) == 3


def test_media_types_and_datasets_are_sampled_by_their_ratios():
    """Ratios are 3:1, and the first is divided 30:10 between its media types: 9/16, 3/16 and 4/16 of the steps."""
    streams = streams_of((3.0, 0, {"video": 30, "image": 10}), (1.0, 0, {"video": 20}))
    assert [(stream.dataset.path, stream.kind) for stream in streams] == [
        ("records0", "video"),
        ("records0", "image"),
        ("records1", "video"),
    ]
    ratios = [stream.ratio for stream in streams]
    assert [ratio / sum(ratios) for ratio in ratios] == [9 / 16, 3 / 16, 4 / 16]
    steps = 20_000
    drawn = np.bincount(BatchSampler(streams, steps, 2, seed=0).stream_of, minlength=3) / steps
    np.testing.assert_allclose(drawn, [9 / 16, 3 / 16, 4 / 16], atol=0.015)  # four standard deviations


def test_ratios_need_not_sum_to_one_nor_be_above_one():
    for scale in (0.01, 1.0, 50.0):
        streams = streams_of((scale, 0, {"video": 5}), (3 * scale, 0, {"image": 7}))
        counts = np.bincount(BatchSampler(streams, 8000, 2, seed=1).stream_of, minlength=2)
        assert abs(counts[1] / 8000 - 0.75) < 0.02


def test_order_does_not_depend_on_the_number_of_steps_but_on_the_seed():
    streams = streams_of((1.0, 0, {"video": 50}), (1.0, 0, {"image": 50}))
    short, long = (BatchSampler(streams, steps, 2, seed=5) for steps in (30, 300))
    assert [short.rows(step).examples for step in range(30)] == [long.rows(step).examples for step in range(30)]
    assert (BatchSampler(streams, 300, 2, seed=6).stream_of != long.stream_of).any()


def test_each_step_continues_its_stream():
    """Rows continue over the steps of a stream: no record repeats before all were used, whatever steps are between."""
    streams = streams_of((1.0, 3, {"video": 15, "image": 27}))
    order = BatchSampler(streams, 60, 4, seed=2)
    taken: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for step in range(60):
        rows = order.rows(step)
        assert rows.stream is streams[order.stream_of[step]]
        assert len(rows.examples) == 4
        taken[rows.stream.kind] += rows.examples
    for kind, length in (("video", 12), ("image", 24)):
        examples = taken[kind]
        assert len(examples) > 2 * length
        assert [where for _, where in examples] == [count // length for count in range(len(examples))]
        for number in range(len(examples) // length):
            records = [record for record, _ in examples[number * length : (number + 1) * length]]
            assert len(set(records)) == length


def test_unusable_datasets_are_refused():
    with pytest.raises(ConfigError, match="records0: holdout 4 leaves none of its 4 image records"):
        streams_of((1.0, 4, {"video": 9, "image": 4}))
    with pytest.raises(ConfigError, match="records0: has audio records, which the vision branch does not accept"):
        streams_of((1.0, 0, {"audio": 4}), branch="vision")
    assert [stream.epoch_length for stream in streams_of((1.0, 3, {"video": 4}))] == [1]


@dataclasses.dataclass(frozen=True)
class FakeCache:
    """Features whose values are the variant."""

    variants: int

    def read(self, record: int, variant: int) -> tuple[np.ndarray, tuple[float, ...]]:
        return np.full(1, variant), ()


@pytest.mark.parametrize(
    ("asked", "cached", "expected"),
    [
        (0, None, [0, 1, 2, 3, 4, 5, 6]),  # new crops in every epoch
        (1, None, [0, 0, 0, 0, 0, 0, 0]),
        (3, None, [0, 1, 2, 0, 1, 2, 0]),
        (0, 4, [0, 1, 2, 3, 0, 1, 2]),  # all variants of the cache
        (2, 4, [0, 1, 0, 1, 0, 1, 0]),  # or fewer
    ],
)
def test_each_epoch_uses_another_variant(monkeypatch, asked, cached, expected):
    monkeypatch.setattr(
        BatchReader, "decode", lambda self, stream, record, variant: DecodedMedia(str(record), np.full(1, variant))
    )
    streams = streams_of((1.0, 1, {"video": 5}))
    config = TrainConfig(
        model="m",
        steps=14,
        batch_size=2,
        datasets=(DatasetConfig(path="records0"),),
        data=DataConfig(variants=asked, num_threads=1),
    )
    caches = {"records0": FakeCache(cached)} if cached else {}
    order = BatchSampler(streams, 14, 2, seed=0)  # two steps per epoch
    reader = BatchReader(config.data, config.branch, config.seed, tiny(), None, order, range(2), caches)
    found = []
    for step in range(14):
        decoded = reader.decode_all(streams[0], order.rows(step).examples)
        found += [int(one.media[0]) for one in decoded]
    assert found == [variant for variant in expected for _ in range(4)]
