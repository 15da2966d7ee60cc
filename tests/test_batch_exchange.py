"""Processes agree on the length of each batch and report masked records to process 0. Threads replace processes."""

import concurrent.futures
import socket
import threading

import numpy as np
import pytest
from processes_in_threads import run_processes

from vllama_jax.data.config import DataConfig
from vllama_jax.data.pipeline import HostBatch, prefetch_batches
from vllama_jax.data.tokenization import pad_texts
from vllama_jax.errors import DataError
from vllama_jax.text.training import IGNORE_INDEX, TrainingText
from vllama_jax.train import batch_exchange
from vllama_jax.train.batch_exchange import BatchExchange

LENGTHS = {0: 5, 1: 9, 2: 3}  # of each process's text


@pytest.fixture
def three(monkeypatch):
    return run_processes(monkeypatch, 3, batch_exchange)


def batch_of(length: int, padded: int, problems: dict[int, str] | None = None) -> HostBatch:
    labels = np.full(length, IGNORE_INDEX, np.int32)
    labels[-1] = 7
    text = TrainingText(np.arange(length, dtype=np.int32), np.arange(length) == 1, labels)
    arrays = pad_texts([text], padded, 1, masked=problems or {}) | {"frames": np.ones((1, 2), np.uint8)}
    return HostBatch(arrays, [f"{length}.png"], problems or {}, 2)


def test_without_other_processes_a_batch_is_unchanged():
    batch = batch_of(5, 8)
    assert BatchExchange([0]).read(3, lambda: batch) is batch
    assert BatchExchange([0]).longest_wait(3, 0.5) == 0.5


def test_all_processes_pad_to_the_longest_and_process_0_knows_all_problems(three):
    store, run = three

    def read(number):
        exchange = BatchExchange([number])
        problems = {0: "truncated"} if number else {}
        batch = exchange.read(4, lambda: batch_of(LENGTHS[number], LENGTHS[number], problems))
        exchange.report_wait(4, number / 10)
        return exchange, batch

    results = run(read)
    for number, (_, batch) in enumerate(results):
        expected = batch_of(LENGTHS[number], 9, batch.problems)
        for name, array in expected.arrays.items():
            np.testing.assert_array_equal(batch.arrays[name], array)
            assert batch.arrays[name].dtype == array.dtype
    assert [batch.masked for _, batch in results] == [
        [("9.png", "truncated"), ("3.png", "truncated")],
        [("9.png", "truncated")],
        [("3.png", "truncated")],
    ]
    waits = run(lambda number: results[number][0].longest_wait(4, number / 10))
    assert waits == [0.2, 0.1, 0.2]
    assert not store.values, "nothing accumulates over the steps"


def test_rows_that_processes_share_are_counted_once(three):
    _, run = three
    rows = {0: [0, 1], 1: [0, 1], 2: [2]}

    def read(number):
        batch = batch_of(5, 5, {0: "truncated"})
        return BatchExchange(rows[number]).read(0, lambda: batch).masked

    assert len(run(read)[0]) == 2


def test_process_0_removes_the_reports_on_a_batch(three):
    store, run = three

    def read(number):
        exchange = BatchExchange([number])
        exchange.read("8-0", lambda: batch_of(5, 5))
        return exchange

    exchanges = run(read)
    assert store.values
    run(lambda number: exchanges[number].remove("8-0") if number else None)
    assert store.values
    run(lambda number: None if number else exchanges[number].remove("8-0"))
    assert not store.values


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_in_reading_ends_all_processes(three, failing):
    _, run = three

    def read(number):
        if number == failing:
            raise DataError("records: corrupt")
        return batch_of(5, 5)

    errors = run(lambda number: BatchExchange([number]).read(0, lambda: read(number)))
    assert {type(error) for error in errors} == {DataError}
    prefix = f"process 2 of 3 ({socket.gethostname()}): " if failing else ""
    assert {str(error) for number, error in enumerate(errors) if number != failing} == {f"{prefix}records: corrupt"}


def test_a_closed_exchange_waits_for_no_other_process(three):
    _, run = three

    def read(number):
        exchange = BatchExchange([number])
        exchange.read(0, lambda: batch_of(5, 5))
        if number == 0:  # the others have stopped
            threading.Timer(0.1, exchange.close).start()
            exchange.read(1, lambda: batch_of(5, 5))

    assert [type(result) for result in run(read)] == [concurrent.futures.CancelledError, type(None), type(None)]


def test_prefetching_calls_finish_for_each_batch():
    finished = []

    def finish(step, read):
        finished.append(step)
        return read() * 10

    assert list(prefetch_batches(lambda step: step + 1, 0, 4, DataConfig(), finish)) == [10, 20, 30, 40]
    assert sorted(finished) == [0, 1, 2, 3]
