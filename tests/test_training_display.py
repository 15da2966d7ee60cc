"""The output of a training run on stderr, on a terminal and in a log file."""

import types

import numpy as np
import pytest

from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli._training_display import TrainingDisplay, _shorten_summary


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def metrics(step: int, loss: float = 2.0, seconds: float = 0.5) -> dict:
    return {
        "step": step,
        "loss": loss,
        "lr": 1e-3,
        "seconds": seconds,
        "samples_per_second": 8,
        "waited_for_data": 0.25,
    }


def test_log_files_have_a_line_every_30_seconds(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter's kernels set it for the commands of a notebook
    clock = Clock()
    with TrainingDisplay(400, clock=clock) as display:
        display.begin(0)
        assert capsys.readouterr().err == "0/400 steps\n"
        for step in range(1, 201):
            clock.now += 0.5
            display.step(metrics(step, loss=4.0 if step == 1 else 2.0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" steps")[0] for line in lines] == ["1/400", "61/400", "121/400", "181/400"]
    assert lines[0] == "1/400 steps  loss 4.0000  lr 1.00e-03  8.0 samples/s  data wait 25%  3 min 20 s left"
    assert lines[-1].endswith("  lr 1.00e-03  8.0 samples/s  data wait 25%  1 min 50 s left")


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (66, "loss 4.0000  lr 1.00e-03  8.0 samples/s  MFU 34.5%  waits 25%"),
        (50, "loss 4.0000  8.0 samples/s  MFU 34.5%  waits 25%"),
        (40, "loss 4.0000  8.0 samples/s  waits 25%"),
    ],
)
def test_narrow_terminals_show_fewer_metrics(width, shown):
    summary = "loss 4.0000  lr 1.00e-03  8.0 samples/s  MFU 34.5%  waits 25%"
    assert _shorten_summary(summary, width) == shown


def test_a_resumed_runs_progress_starts_at_its_step(capsys):
    with TrainingDisplay(10) as display:
        display.begin(7)
    assert capsys.readouterr().err == "7/10 steps\n"


@pytest.mark.parametrize(("seconds", "left"), [(0.001, "1 s"), (2, "20 s"), (61, "10 min 10 s"), (3600, "10 h 00 min")])
def test_remaining_time_is_formatted(capsys, seconds, left):
    with TrainingDisplay(11) as display:
        display.step(metrics(1, seconds=seconds))
    assert capsys.readouterr().err.endswith(f"  {left} left\n")


def test_parameters_are_summarized_by_module_or_listed(capsys):
    shapes = {
        "video_qformer/a/kernel": (2, 3),
        "video_qformer/a/bias": (3,),
        "llama_proj/kernel": (2, 2),
        "frame_positions": (8,),
        "vit/x": (7,),
    }
    trainable_paths = [path for path in shapes if not path.startswith("vit")]
    sources = dict.fromkeys(trainable_paths)
    base, miniature = types.SimpleNamespace(trained=(), path="BASE", digest="other"), open_model("miniature")
    plan = types.SimpleNamespace(
        trainable_paths=trainable_paths,
        sources=sources | {"llama_proj/kernel": base, "frame_positions": miniature},
        abstract_model=types.SimpleNamespace(variables={path: np.zeros(shape) for path, shape in shapes.items()}),
        dtype=np.dtype("float32"),
        mesh_summary="mesh: data 2, fsdp 1, tensor 1",
    )
    TrainingDisplay(10).show_plan(plan)
    text = capsys.readouterr().err
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["video_qformer", "2", "9", "random"],
        ["llama_proj", "1", "4", "BASE"],
        ["frame_positions", "1", "8", "miniature"],
    ]
    assert text.splitlines()[-2:] == ["21 trainable parameters, 7 frozen (float32)", plan.mesh_summary]
    TrainingDisplay(10, verbose=True).show_plan(plan)
    text = capsys.readouterr().err
    assert [path in text for path in shapes] == [True, True, True, True, False]
    assert "2×3" in text
