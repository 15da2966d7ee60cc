"""Corrupt checkpoints: training resumes from the previous one, `verify` reports them, and loading refuses them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from written_runs import state_of, vision_stage1_config, weights_of, write_checkpoints, write_run_of_two_checkpoints

from vllama_jax import cli
from vllama_jax.checkpoints import digests
from vllama_jax.checkpoints.digests import check_checkpoint, list_checkpoint_steps
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.config import NO_LORA
from vllama_jax.errors import CheckpointError
from vllama_jax.train import run_directory as runs
from vllama_jax.train.config import CheckpointConfig
from vllama_jax.train.run_directory import Checkpoints


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory) -> Path:
    """A run with checkpoints of steps 4 and 8. Read-only."""
    return write_run_of_two_checkpoints(tiny_model, tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def restored(run: Path) -> int | None:
    """Return the step that a run resumes from, after checking the weights and the optimizer state of that step."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state_of(0, weights_of(0)))
    state = Checkpoints(run, CheckpointConfig()).restore(like)
    if state is None:
        return None
    step = int(state.step)
    assert int(state.opt_state[0].count) == step
    for path, value in weights_of(step).items():
        np.testing.assert_array_equal(state.weights[path], value, err_msg=path)
    return step


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# Kinds of corruption

PARTS = ("_METADATA", "_sharding", "manifest.ocdbt", "commit_success.txt", "array_metadatas/process_0", "d/*")
FILES = [
    *(f"{item}/{part}" for item in ("weights", "moments") for part in PARTS),
    *(f"{item}/ocdbt.process_0/{part}" for item in ("weights", "moments") for part in ("manifest.ocdbt", "d/*")),
    *("iterator/metadata", "iterator/commit_success.txt", "digests.json"),
]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


CORRUPTIONS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "removed": Path.unlink,
    "one bit flipped": flip,
    "appended to": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "replaced by a directory": replace_by_directory,
}


def largest(checkpoint: Path, pattern: str) -> Path:
    """Return the largest file that matches a pattern."""
    return max(checkpoint.glob(pattern), key=lambda file: file.stat().st_size)


def test_digests_list_every_file_except_two_of_orbax(saved):
    listed = json.loads((saved / "step_8/digests.json").read_text())["files"]
    assert files(saved / "step_8").keys() - listed.keys() == {
        "digests.json",
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
    }
    assert all((saved / "step_8" / name).stat().st_size == file["size"] for name, file in listed.items())
    for pattern in FILES:
        assert largest(saved / "step_8", pattern).is_file()


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_any_corruption_of_any_file_is_detected(saved, tmp_path, corrupt):
    copy = shutil.copytree(saved / "step_8", tmp_path / "step_8")
    for file in [largest(copy, pattern) for pattern in FILES]:
        assert check_checkpoint(copy)
        content = file.read_bytes()
        CORRUPTIONS[corrupt](file)
        with pytest.raises(CheckpointError) as raised:
            check_checkpoint(copy)
        assert str(raised.value).startswith(str(copy))
        assert "\n" not in str(raised.value)
        if file.name != "digests.json":  # a flipped bit there may change another file's name
            assert str(raised.value).startswith(f"{file}: ")
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.write_bytes(content)


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("text")


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def dangling(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("nowhere")


def another_step(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step_4"), path)


WHOLE: dict[str, Callable[[Path], object]] = {
    **{
        f"{item} removed": lambda path, item=item: shutil.rmtree(path / item)
        for item in ("weights", "moments", "iterator")
    },
    **{f"{item} is a file": lambda path, item=item: replace_by_file(path / item) for item in ("weights", "moments")},
    "a file": replace_by_file,
    "an empty directory": empty,
    "a dangling link": dangling,
    "a copy of another step": another_step,
    "only digests left": lambda path: [shutil.rmtree(path / item) for item in ("weights", "moments", "iterator")],
}
TRIED = {
    **{
        f"{pattern} {corrupt}": lambda path, pattern=pattern, corrupt=corrupt: CORRUPTIONS[corrupt](
            largest(path, pattern)
        )
        for pattern in ("weights/ocdbt.process_0/d/*", "moments/d/*", "digests.json")
        for corrupt in CORRUPTIONS
    },
    **WHOLE,
}


@pytest.mark.parametrize("corrupt", TRIED)
def test_a_corrupt_checkpoint_is_renamed_and_the_previous_one_restored(run, caplog, corrupt):
    TRIED[corrupt](run / "step_8")
    before = files(run / "step_8")
    assert restored(run) == 4
    assert "step_8" in caplog.text
    assert "falling back to the previous checkpoint" in caplog.text
    assert list_checkpoint_steps(run) == [4]
    assert os.path.lexists(run / "damaged_step_8")
    assert files(run / "damaged_step_8") == before
    if corrupt in WHOLE:  # training saves that step again
        checkpoints = Checkpoints(run, CheckpointConfig())
        checkpoints.save(8, state_of(8, weights_of(8)))
        checkpoints.finish()
        assert restored(run) == 8


@pytest.mark.parametrize(
    "error",
    [Exception("of Orbax"), RuntimeError(), MemoryError(), StopIteration(3), PermissionError(13, "Permission denied")],
)
def test_any_orbax_error_means_a_corrupt_checkpoint(run, caplog, monkeypatch, error):
    restore = ocp.Checkpointer.restore

    def fail(self, directory, *arguments, **options):
        if "step_8/moments" in str(directory):
            raise error
        return restore(self, directory, *arguments, **options)

    monkeypatch.setattr(ocp.Checkpointer, "restore", fail)
    assert restored(run) == 4
    assert f"step_8/moments: the weights cannot be read ({str(error) or type(error).__name__})" in caplog.text
    assert (run / "damaged_step_8").is_dir()


def test_an_unreadable_file_is_an_error(run, caplog, monkeypatch):
    refused, opened = largest(run / "step_8", "moments/d/*"), Path.open

    def refuse(self, *arguments, **options):
        if self == refused:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert restored(run) == 4
    assert f"{refused}: cannot be read (Permission denied)" in caplog.text


def test_a_step_corrupted_again_keeps_earlier_renamed_copies(run):
    intact = shutil.copytree(run / "step_8", run / "intact")
    for name in ("damaged_step_8", "damaged_step_8.2", "damaged_step_8.3"):
        flip(largest(run / "step_8", "weights/d/*"))
        before = files(run / "step_8")
        assert restored(run) == 4
        assert files(run / name) == before
        shutil.copytree(intact, run / "step_8")


@pytest.mark.parametrize("corrupt", ["moments/d/* emptied", "digests.json removed", "a file", "moments removed"])
def test_without_an_intact_checkpoint_nothing_is_changed(run, corrupt):
    for step in (4, 8):
        TRIED[corrupt](run / f"step_{step}")
    before = files(run)
    for _ in range(2):  # as a requeued job would
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints can be read"):
            restored(run)
    assert files(run) == before


def test_removed_checkpoints_are_detected(run, caplog):
    shutil.rmtree(run / "step_8")
    assert restored(run) == 4
    assert "step_8: missing; falling back" in caplog.text
    shutil.rmtree(run / "step_4")
    with pytest.raises(CheckpointError, match="step_8 was saved, but no checkpoint is left"):
        restored(run)
    (run / "last_saved.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"last_saved.json: not JSON"):
        restored(run)
    (run / "last_saved.json").unlink()
    assert restored(run) is None


def test_corrupt_orbax_metadata_is_ignored(run):
    for name in digests.ORBAX_FILES:
        (run / "step_8" / name).write_bytes(b"\xff")
    assert restored(run) == 8
    checkpoints = Checkpoints(run, CheckpointConfig(max_to_keep=1))
    checkpoints.save(12, state_of(12, weights_of(12)))
    checkpoints.finish()
    assert list_checkpoint_steps(run) == [12]


STRANGE = (
    "step_²",
    "step_-1",
    "step_1.5",
    "step_007",
    "step_",
    "step_9x",
    "step_1٣",
    "step_+9",
    "step_ 9",
    "step_9.orbax-checkpoint-tmp",
)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_similar_directory_names_are_not_checkpoints(run, make):
    for name in STRANGE:
        make(run / name)
    assert list_checkpoint_steps(run) == [4, 8]
    assert open_model(run).trained[-1].path == run / "step_8/weights"
    assert restored(run) == 8
    checkpoints = Checkpoints(run, CheckpointConfig())
    checkpoints.save(9, state_of(9, weights_of(9)))
    checkpoints.finish()
    assert restored(run) == 9


# Earlier versions


def remove_digests(run: Path) -> Path:
    for step in list_checkpoint_steps(run):
        (run / f"step_{step}/digests.json").unlink()
        (run / f"step_{step}/iterator/metadata").write_text(json.dumps({"step": step}))
    (run / "last_saved.json").unlink()
    return run


def test_checkpoints_without_digests_are_read(run):
    remove_digests(run)
    assert restored(run) == 8
    assert open_model(run).trained[-1].path == run / "step_8/weights"


@pytest.mark.parametrize("corrupt", ["truncated", "emptied", "removed"])
def test_corruption_that_orbax_detects_is_handled(run, corrupt):
    remove_digests(run)
    CORRUPTIONS[corrupt](largest(run / "step_8", "weights/ocdbt.process_0/d/*"))
    assert restored(run) == 4
    assert (run / "damaged_step_8").is_dir()


# Loading


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_a_run_with_a_corrupt_last_checkpoint_is_not_loaded(run, corrupt):
    CORRUPTIONS[corrupt](largest(run / "step_8", "weights/ocdbt.process_0/d/*"))
    message = r"run: its last checkpoint, step_8, is corrupt \(.*\); rename step_8 to damaged_step_8 to use step_4$"
    with pytest.raises(CheckpointError, match=message):
        open_model(run)
    (run / "step_8").rename(run / "damaged_step_8")
    assert open_model(run).trained[-1].path == run / "step_4/weights"


def test_loading_reads_only_weights(run):
    shutil.rmtree(run / "step_8/moments")
    assert open_model(run).trained[-1].path == run / "step_8/weights"


def test_a_base_that_is_a_corrupt_run_is_refused(run, tmp_path):
    write_checkpoints(vision_stage1_config(run, NO_LORA), tmp_path / "later", {4: weights_of(1)})
    flip(largest(run / "step_8", "weights/manifest.ocdbt"))
    with pytest.raises(
        CheckpointError, match=r"/run: not the base model that .*later was trained on|step_8, is corrupt"
    ):
        open_model(tmp_path / "later")


def test_without_digests_a_checkpoint_is_not_committed(run, monkeypatch):
    def full(checkpoint: Path, step: int) -> None:
        raise OSError(28, "No space left on device", str(checkpoint / "digests.json"))

    monkeypatch.setattr(runs, "write_digests", full)
    checkpoints = Checkpoints(run, CheckpointConfig())
    checkpoints.save(12, state_of(12, weights_of(12)))
    with pytest.raises(
        CheckpointError, match=r"step 12 could not be saved \(No space left on device\); the last checkpoint"
    ):
        checkpoints.finish()
    checkpoints.finish()
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "last_saved.json", "step_4", "step_8"]
    assert restored(run) == 8


# vllama verify


def verified(capsys, *arguments: object) -> tuple[str, str]:
    """Return the output of `vllama verify` and its error."""
    message = ""
    try:
        cli.main(["verify", *map(str, arguments)])
    except SystemExit as error:
        message = str(error)
    return capsys.readouterr().out, message


def test_verify_checks_all_checkpoints_and_the_base(run, tiny_model, capsys):
    out, message = verified(capsys, run)
    lines = out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{run}/step_4", f"{run}/step_8", str(tiny_model)]
    assert all(line.endswith(" kB, intact") for line in lines[:2])
    assert message == ""
    flip(file := largest(run / "step_4", "moments/d/*"))
    out, message = verified(capsys, run)
    assert [line.split(": ")[1] == "corrupt" for line in out.splitlines()] == [True, False]
    assert message == (
        f"vllama: {run}: corrupt: {run}/step_4 ({file}: its content has changed since it was saved); "
        "restore it from a copy; a resumed run continues from its last intact checkpoint"
    )
    shutil.rmtree(run / "step_8/weights")
    out, message = verified(capsys, run, "--json")
    report = json.loads(out)
    assert report["corrupt"].keys() == {f"{run}/step_4", f"{run}/step_8"}
    assert [bool(one["damage"]) for one in report["checkpoints"]] == [True, True]
    assert [one["digests"] for one in report["checkpoints"]] == [True, True]
    assert "step_8/weights/_METADATA: No such file or directory; " in message


def test_verify_checks_the_runs_that_a_run_is_based_on(run, tmp_path, capsys):
    later = write_checkpoints(vision_stage1_config(run, NO_LORA), tmp_path / "later", {3: weights_of(3)})
    out, _ = verified(capsys, later)
    assert [line.split(": ")[0] for line in out.splitlines()[:-1]] == [
        f"{later}/step_3",
        *(f"{run}/step_{n}" for n in (4, 8)),
    ]
    replace_by_file(run / "step_8")
    out, message = verified(capsys, later)
    assert f"{run}/step_8: corrupt" in out
    assert f"{run}/step_8: not a directory" in message


def test_verify_accepts_runs_of_an_earlier_version(run, capsys):
    out, _ = verified(capsys, remove_digests(run))
    assert out.count("no digests recorded (saved by an earlier version); weights are readable\n") == 2
    os.truncate(largest(run / "step_4", "weights/ocdbt.process_0/d/*"), 0)
    out, message = verified(capsys, run)
    assert f"{run}/step_4: corrupt\n{run}/step_8: no digests recorded" in out
    assert f"{run}/step_4 ({run}/step_4/weights: " in message
