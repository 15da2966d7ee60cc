"""`vllama plot`: figures of one run and of several, and the moving average of the loss."""

import json
from pathlib import Path

import pytest
from cli_fixtures import expect_error

from vllama_jax import cli
from vllama_jax.train.plots import plot_metrics, read_metrics
from vllama_jax.train.smoothing import default_smoothing, smooth


def write_run(folder: Path, losses: list[float], holdout: dict[int, float] | None = None) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": loss, "lr": 1e-3 / step} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if holdout:
        found = [{"step": step, "validation_loss": loss} for step, loss in holdout.items()] + [{"answer": "a dog"}]
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return folder


def test_the_moving_average_is_bias_corrected():
    assert smooth([4.0, 4.0, 4.0], 0.9) == pytest.approx([4.0, 4.0, 4.0])
    beta, values = 0.8, [3.0, 1.0, 2.0]
    plain = [0.2 * 3, 0.8 * 0.2 * 3 + 0.2 * 1, 0.64 * 0.2 * 3 + 0.8 * 0.2 * 1 + 0.2 * 2]
    assert smooth(values, beta) == pytest.approx([m / (1 - beta**n) for n, m in enumerate(plain, 1)])
    assert smooth(values, 0.0) == values


@pytest.mark.parametrize(("steps", "window"), [(1, 1), (19, 1), (20, 2), (100, 10), (500, 50), (12_500, 50)])
def test_the_window_fits_the_run(steps, window):
    assert 1 / (1 - default_smoothing(steps)) == pytest.approx(window)


def test_loss_of_one_run_is_plotted(tmp_path, capsys):
    run = write_run(tmp_path / "first", [3.0, 2.5, 2.0])
    cli.main(["plot", str(run)])
    assert capsys.readouterr().out == f"{run}/loss.png: steps 1 to 3, last loss 2.0000\n"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    figure = plot_metrics({run: read_metrics(run)}, None)
    assert figure.get_suptitle() == "first: training loss, 3 steps"


def test_several_runs_are_compared_in_one_figure(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "one/run", [3.0] * 40, {20: 2.9, 40: 2.8}),
        write_run(tmp_path / "two/run", [2.0] * 400),
        write_run(tmp_path / "short", [1.0]),
    ]
    cli.main(["plot", *map(str, runs), "--out", str(tmp_path / "all.png")])
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"{runs[0]}: steps 1 to 40, last loss 3.0000",
        f"{runs[1]}: steps 1 to 400, last loss 2.0000",
        f"{runs[2]}: steps 1 to 1, last loss 1.0000",
        f"{tmp_path}/all.png",
    ]
    figure = plot_metrics({run: read_metrics(run) for run in runs}, None)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == [
        f"{runs[0]} (average over about 4 steps)",
        f"{runs[0]} (validation)",
        f"{runs[1]} (average over about 40 steps)",
        "short (each step)",
    ]
    assert figure.get_suptitle() == "Training loss of 3 runs"
    cli.main(["plot", str(runs[2]), str(runs[1])])
    assert (runs[2] / "compared.png").is_file()


def test_runs_that_cannot_be_plotted_are_a_one_line_error(tmp_path, capsys):
    full = write_run(tmp_path / "whole", [2.0])
    assert "none/metrics.jsonl: no such file; give a run directory" in expect_error(capsys, "plot", tmp_path / "none")
    assert "none/metrics.jsonl: no such file" in expect_error(capsys, "plot", full, tmp_path / "none")
    run = write_run(tmp_path / "run", [])
    assert "no step has been done yet; wait for the first" in expect_error(capsys, "plot", run)
    journal = run / "metrics.jsonl"
    journal.write_text('{"step": 1, "loss"')  # the first line is incomplete
    assert "no step has been done yet; wait for the first" in expect_error(capsys, "plot", run)
    for line in ("x", "[1]", '{"step": 1}', '{"step": 1, "loss": "a", "lr": 1}', '{"step": 1, "loss": NaN, "lr": 1}'):
        journal.write_text(f"{line}\n")
        assert f"{journal}, line 1: " in expect_error(capsys, "plot", run)
    assert "cannot be written" in expect_error(capsys, "plot", full, "--out", tmp_path / "no/folder.png")
