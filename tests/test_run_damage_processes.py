"""Two processes that resume a run with a corrupt last checkpoint restore the same earlier one."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from written_runs import vision_stage1_config, write_checkpoints

from vllama_jax.config import NO_LORA

pytestmark = pytest.mark.slow
CODE = """
import sys, jax, numpy as np, optax
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec
run, number, port, failing = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(number))
from vllama_jax.train import run_directory as runs
from vllama_jax.train.config import CheckpointConfig
from vllama_jax.train.state import TrainState
place = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec())
def like(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
abstract = TrainState(
    like((), np.int32), {"llama_proj/bias": like((64,), np.float32)}, (optax.ScaleByScheduleState(like((), np.int32)),)
)
read = runs.restore_arrays
def fail(path, wanted):
    found = read(path, wanted)
    if failing == number and "step_8/moments" in str(path):
        raise runs.CheckpointError(f"{path}: a disk that only this process cannot read")
    return found
runs.restore_arrays = fail
try:
    state = runs.Checkpoints(Path(run), CheckpointConfig()).restore(abstract)
    print("restored", int(state.step), int(state.opt_state[0].count), float(state.weights["llama_proj/bias"][0]))
except runs.CheckpointError as error:
    print("refused", error)
"""


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "run"
    weights = {step: {"llama_proj/bias": np.full(64, step, np.float32)} for step in (4, 8)}
    return write_checkpoints(vision_stage1_config(tiny_model, NO_LORA), out, weights)


def restored_by_two(run: Path, port: int, failing: str = "none") -> list[str]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(run), str(n), str(port), failing], stdout=subprocess.PIPE, text=True
        )
        for n in (0, 1)
    ]
    return [process.communicate(timeout=300)[0].splitlines()[-1] for process in processes]


def corrupt(checkpoint: Path) -> None:
    file = max(checkpoint.glob("moments/d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def test_both_processes_restore_the_previous_checkpoint(saved, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    assert restored_by_two(run, 9931) == ["restored 8 8 8.0"] * 2
    corrupt(run / "step_8")
    assert restored_by_two(run, 9932) == ["restored 4 4 4.0"] * 2
    assert (run / "damaged_step_8").is_dir()
    corrupt(run / "step_4")
    first, second = restored_by_two(run, 9933)
    assert first.startswith(f"refused {run}: none of the 1 checkpoints can be read")
    assert second == first
    assert (run / "step_4").is_dir()


@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_checkpoint_that_one_process_cannot_read_is_skipped_by_both(saved, tmp_path, failing):
    run = shutil.copytree(saved, tmp_path / "run")
    assert restored_by_two(run, 9934 + int(failing), failing) == ["restored 4 4 4.0"] * 2
    assert (run / "damaged_step_8").is_dir()
