"""Processes decide together and fail together. Threads replace processes."""

import dataclasses
import socket

import pytest
from processes_in_threads import run_processes

import vllama_jax
from vllama_jax.errors import CheckpointError, ConfigError, VllamaError
from vllama_jax.runtime import coordination
from vllama_jax.runtime.coordination import decide, gather, share_errors
from vllama_jax.train import hosts
from vllama_jax.train.config_files import load_config

HOST = socket.gethostname()


@pytest.fixture
def four(monkeypatch):
    return run_processes(monkeypatch, 4, hosts)[1]


def test_a_single_process_decides_alone():
    assert coordination.find_store() is None
    assert decide(lambda: 7) == 7
    assert gather("a") == ["a"]
    with pytest.raises(KeyError), share_errors():
        raise KeyError


def test_only_process_0_decides_and_all_learn_the_result(four):
    called = []

    def choose(number):
        return decide(lambda: called.append(number) or {"step": 8}), decide(lambda: None), gather(number)

    assert four(choose) == [({"step": 8}, None, [0, 1, 2, 3])] * 4
    assert called == [0]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (CheckpointError("RUN: gone"), CheckpointError, "RUN: gone"),
        (OSError(5, "Input/output error", "RUN"), VllamaError, "RUN: Input/output error"),
        (ValueError("a\nbug"), VllamaError, "ValueError: a bug; see its output"),
    ],
)
def test_an_error_of_one_process_is_raised_in_all(four, error, kind, text):
    def fail(failing):
        def run(number):
            with share_errors():
                if number in failing:
                    raise error

        return run

    is_bug = isinstance(error, ValueError)
    first = f"process 0 of 4 ({HOST}): " if is_bug else ""
    for failing, prefix in (((0, 2), first), ((2, 3), f"process 2 of 4 ({HOST}): "), ((0, 1, 2, 3), "")):
        for number, raised in enumerate(four(fail(failing))):
            if is_bug and number in failing:
                assert raised is error, "its traceback stays"
                continue
            assert (type(raised), str(raised)) == (kind, f"{prefix}{text}")
            assert raised.in_all_processes


def test_a_refusal_of_process_0_is_raised_in_all(four):
    def refuse(number):
        decide(lambda: (_ for _ in ()).throw(ConfigError("RUN: contains a run with another config")))

    assert {(type(error), str(error)) for error in four(refuse)} == {
        (ConfigError, "RUN: contains a run with another config")
    }


def test_a_host_with_another_config_or_code_is_refused_by_all(four, monkeypatch, tmp_path):
    config, _ = load_config("vision_stage1")
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5), steps=3)
    assert four(lambda number: hosts.check_same_job(config, None)) == [None] * 4
    errors = four(lambda number: hosts.check_same_job(other if number == 2 else config, None))
    assert {str(error) for error in errors} == {
        f"process 2 of 4 ({HOST}): another config than process 0 (optim.lr 0.5, process 0: {config.optim.lr}; "
        f"steps 3, process 0: {config.steps}); {hosts.ADVICE}"
    }
    errors = four(lambda number: hosts.check_same_job(config, tmp_path / ("b" if number == 3 else "a")))
    assert {str(error) for error in errors} == {
        f"process 3 of 4 ({HOST}): another config than process 0 (out '{tmp_path}/b', process 0: '{tmp_path}/a'); "
        f"{hosts.ADVICE}"
    }
    describe = hosts._describe_job
    monkeypatch.setattr(
        hosts, "_describe_job", lambda *_: describe(config, None) | {"code": f"{coordination.process_number()}" * 64}
    )
    version = vllama_jax.__version__
    assert {str(error) for error in four(lambda number: hosts.check_same_job(config, None))} == {
        f"process 1 of 4 ({HOST}): another version of vllama_jax ({version}, source files 11111111, process 0: "
        f"{version}, source files 00000000); {hosts.ADVICE}"
    }


def test_a_host_with_other_records_is_refused_by_all(four):
    digests = {"model": "1", "datasets.0.path": "2"}
    assert four(lambda number: hosts.check_same_inputs(digests)) == [None] * 4
    errors = four(lambda number: hosts.check_same_inputs(digests | ({"datasets.0.path": "3"} if number == 1 else {})))
    assert {(type(error), str(error)) for error in errors} == {
        (
            ConfigError,
            f"process 1 of 4 ({HOST}): datasets.0.path: its files differ from those of process 0; copy them again, or "
            "use shared storage",
        )
    }


def test_the_digest_of_source_files_covers_linked_folders_names_and_contents(tmp_path):
    package, linked = tmp_path / "package", tmp_path / "linked"
    for folder in (package, linked):
        folder.mkdir()
        (folder / "a.py").write_text("1")
    (package / "below").symlink_to(linked)
    before = hosts.digest_source_files(package)
    (package / "notes.txt").write_text("not code")
    assert hosts.digest_source_files(package) == before
    (linked / "a.py").write_text("2")
    after = hosts.digest_source_files(package)
    (linked / "a.py").rename(linked / "b.py")
    assert len({before, after, hosts.digest_source_files(package)}) == 3
