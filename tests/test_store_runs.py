"""Runs whose directory is on an object store: checkpoints, metrics, the lease."""

import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from orbax.checkpoint import multihost
from train_fixtures import RecordingReporter, config_of

import vllama_jax as vl
from vllama_jax.checkpoints.digests import list_checkpoint_steps, read_digests
from vllama_jax.checkpoints.store_arrays import HostArray, copy_shards
from vllama_jax.io import leases
from vllama_jax.io.paths import as_path
from vllama_jax.train.config import CheckpointConfig
from vllama_jax.train.loop import train
from vllama_jax.train.run_directory import leaves_by_path
from vllama_jax.train.state import TrainState
from vllama_jax.train.store_checkpoints import StoreCheckpoints

RUN = "memory://bucket/run"


def make_state(step: int) -> TrainState:
    """A small state that is sharded over the devices, and differs from step to step."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    weights = {
        "a/kernel": jax.device_put(np.arange(32, dtype=np.float32).reshape(16, 2) + step, sharded),
        "b": jax.device_put(np.full(3, step, np.float32), replicated),
    }
    moments = ({"count": jax.device_put(np.int32(step), replicated), "mu": weights},)
    return TrainState(jax.device_put(np.int32(step), replicated), weights, moments)


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def save(checkpoints: StoreCheckpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, make_state(step))
        checkpoints.finish()


def restored_step(**options) -> int:
    """The step of the checkpoint that a resumed run starts from, after all values are compared."""
    state = StoreCheckpoints(as_path(RUN), CheckpointConfig(**options)).restore(abstract(make_state(0)))
    assert state is not None
    expected = make_state(int(state.step))
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == other.sharding
    return int(state.step)


@pytest.fixture
def checkpoints(bucket):
    """Checkpoints of a run whose lease this process holds."""
    with leases.hold_lease(as_path(RUN) / leases.LEASE, "busy"):
        yield StoreCheckpoints(as_path(RUN), CheckpointConfig(max_to_keep=2, keep_period=4))


def test_checkpoints_are_saved_restored_and_removed(checkpoints):
    assert checkpoints.restore(abstract(make_state(0))) is None
    save(checkpoints, 1, 4, 5, 6)
    assert list_checkpoint_steps(as_path(RUN)) == [4, 5, 6], "the last two, and that of keep_period"
    assert restored_step() == 6
    assert not (as_path(RUN) / "step_1").exists()
    assert json.loads((as_path(RUN) / "last_saved.json").read_text()) == {"step": 6}
    names = (as_path(RUN) / "step_6").file_sizes()
    assert {f"weights/a.kernel/{shard}.0" for shard in range(8)} < names.keys(), "one object for each shard"
    assert checkpoints.size(6) == sum(names.values())


def test_a_partial_checkpoint_is_ignored_and_removed(checkpoints):
    """digests.json is written last; a killed save has none."""
    save(checkpoints, 1, 2)
    (as_path(RUN) / "step_2/digests.json").unlink()
    assert list_checkpoint_steps(as_path(RUN)) == [1]
    assert restored_step() == 1
    assert not (as_path(RUN) / "step_2").exists()


def test_a_corrupt_checkpoint_is_left_out(checkpoints, caplog):
    save(checkpoints, 1, 2)
    shard = as_path(RUN) / "step_2/weights/a.kernel/3.0"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    assert restored_step() == 1
    assert "step_2/weights/a.kernel/3.0: " in caplog.text
    assert list_checkpoint_steps(as_path(RUN)) == [1]
    assert shard.exists(), "the files stay until the step is saved again"
    save(checkpoints, 2)
    assert restored_step() == 2


def test_a_failed_save_is_reported_and_earlier_checkpoints_stay(checkpoints, bucket, monkeypatch):
    save(checkpoints, 1)
    real = type(bucket).pipe_file

    def pipe_file(self, path, value, **options):
        if "step_2/moments" in path:
            raise RuntimeError("quota exceeded")
        return real(self, path, value, **options)

    monkeypatch.setattr(type(bucket), "pipe_file", pipe_file)
    checkpoints.save(2, make_state(2))
    with pytest.raises(vl.CheckpointError) as failed:
        checkpoints.finish()
    assert str(failed.value) == (
        f"{RUN}: the checkpoint of step 2 could not be saved (quota exceeded); earlier ones are kept"
    )
    assert list_checkpoint_steps(as_path(RUN)) == [1]


def test_a_run_that_lost_its_lease_commits_nothing(checkpoints):
    save(checkpoints, 1)
    (as_path(RUN) / leases.LEASE).write_bytes(b'{"owner": "x", "token": "other", "renewed": 1.0}')
    checkpoints.save(2, make_state(2))
    with pytest.raises(vl.CheckpointError, match="another process has taken over its lease"):
        checkpoints.finish()
    assert list_checkpoint_steps(as_path(RUN)) == [1]


def write_lease(renewed: float) -> None:
    fields = {"owner": "process 1 on host", "token": "other", "renewed": renewed}
    (as_path(RUN) / leases.LEASE).write_bytes(json.dumps(fields).encode())


def test_a_lease_is_removed_at_the_end_and_renewed_before(bucket, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.01)
    lease = as_path(RUN) / leases.LEASE
    with leases.hold_lease(lease, "busy"):
        first = lease.read_bytes()
        deadline = time.monotonic() + 30
        while lease.read_bytes() == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lease.read_bytes() != first
    assert not lease.exists()


def test_a_stale_lease_is_taken_over(bucket):
    write_lease(time.time() - leases.STALE_SECONDS - 1)
    with leases.hold_lease(as_path(RUN) / leases.LEASE, "busy"):
        leases.check_lease(as_path(RUN) / leases.LEASE)


def test_a_lease_that_is_not_renewed_is_taken_over_after_waiting(bucket, monkeypatch, caplog):
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.2)
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.01)
    write_lease(time.time() + 1000)  # by a clock that is ahead
    with leases.hold_lease(as_path(RUN) / leases.LEASE, "busy"):
        leases.check_lease(as_path(RUN) / leases.LEASE)
    assert "process 1 on host holds its lease; waiting up to" in caplog.text


def test_a_lease_that_is_renewed_is_respected(bucket, monkeypatch):
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.01)
    write_lease(time.time())
    renewing = threading.Timer(0.1, write_lease, [time.time() + 1])
    renewing.start()
    with pytest.raises(vl.CheckpointError, match="busy"), leases.hold_lease(as_path(RUN) / leases.LEASE, "busy"):
        pass
    renewing.join()
    assert (as_path(RUN) / leases.LEASE).exists()


@pytest.mark.slow
def test_a_run_on_a_store_is_the_same_run(bucket, tiny_model, image_records, one_device, tmp_path):
    """Losses are bit-identical, also resumed in the middle. The run can be read as a model and as an init run."""
    config = config_of(
        tiny_model, image_records, steps=4, checkpoint=CheckpointConfig(save_interval_steps=2), remat_policy="none"
    )
    train(config, tmp_path / "run", RecordingReporter())
    local = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]

    class Stop(RecordingReporter):
        def step(self, metrics):
            super().step(metrics)
            if metrics["step"] == 3:
                raise vl.VllamaError("stopped")

    with pytest.raises(vl.VllamaError, match="stopped"):
        train(config, as_path(RUN), Stop())
    assert list_checkpoint_steps(as_path(RUN)) == [2]
    reporter = RecordingReporter()
    result = train(config, as_path(RUN), reporter)
    assert reporter.begun == 2
    stored = [json.loads(line) for line in (as_path(RUN) / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in stored] == [(line["step"], line["loss"]) for line in local]
    assert not (as_path(RUN) / leases.LEASE).exists()
    for one, other in zip(
        jax.tree.leaves(vl.load(result.path, stacked=True).network),
        jax.tree.leaves(vl.load(tmp_path / "run", stacked=True).network),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(vl.ConfigError, match="another config"):
        train(dataclasses.replace(config, seed=7), as_path(RUN), RecordingReporter())


def test_processes_write_their_shards_and_the_first_commits(checkpoints, monkeypatch):
    """Two processes as two threads: shards 0 to 3 are on the devices of the first, 4 to 7 on those of the second."""
    thread = threading.local()
    barrier = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: thread.process)
    monkeypatch.setattr(multihost, "get_barrier_sync_fn", lambda: lambda **options: barrier.wait())
    state = make_state(3)
    whole = {
        part: {path: copy_shards(array) for path, array in arrays.items()}
        for part, arrays in {"weights": state.weights, "moments": leaves_by_path(state.opt_state)}.items()
    }

    def own_shards(array: HostArray, process: int) -> HostArray:
        shards = {index: shard for index, shard in array.shards.items() if sum(index) // 4 == process}
        return dataclasses.replace(array, shards=shards)

    def write(process: int) -> None:
        thread.process = process
        parts = {
            part: {path: own_shards(array, process) for path, array in arrays.items()} for part, arrays in whole.items()
        }
        checkpoints._write(3, parts)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    monkeypatch.undo()
    assert restored_step() == 3
    assert len(read_digests(as_path(RUN) / "step_3").files) == len(
        [name for name in (as_path(RUN) / "step_3").file_sizes() if name not in ("digests.json", "process_1.json")]
    )
