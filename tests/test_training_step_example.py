"""examples/training_step.py: three manual steps with decreasing loss; the saved model answers."""

import runpy
from pathlib import Path

import pytest

import vllama_jax as vl

EXAMPLE = Path(__file__).parents[1] / "examples" / "training_step.py"


@pytest.mark.slow
def test_the_loss_decreases_and_the_saved_model_has_the_trained_weights(tmp_path, capsys):
    losses = runpy.run_path(str(EXAMPLE))["main"](tmp_path / "out")
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2]
    message = capsys.readouterr().out
    assert f"step 3: loss {losses[2]:.4f}" in message
    assert "8 frames of 1.5 s; no audio in the file" in message
    before, after = (vl.load(tmp_path / "out" / name, stacked=True) for name in ("start", "model"))
    assert (before.network.llama_proj.kernel[...] != after.network.llama_proj.kernel[...]).any()
    assert (before.network.llama.embedding[...] == after.network.llama.embedding[...]).all()
