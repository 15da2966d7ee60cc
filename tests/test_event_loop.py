"""Weights and checkpoints are read and written where an event loop runs: in notebooks and in coroutines."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from train_fixtures import losses, short_config

import vllama_jax as vl
from vllama_jax.runtime.event_loop import call_without_event_loop


@pytest.fixture(autouse=True)
def without_nest_asyncio(monkeypatch):
    """Jupyter's kernel has installed neither of them since ipykernel 7, but other packages may have."""
    for name in ("nest_asyncio", "uvloop"):
        monkeypatch.setattr(f"orbax.checkpoint._src.asyncio_utils.{name}", None)


def run_in_loop(function: Callable[[], Any]) -> Any:
    async def run() -> Any:
        return function()

    return asyncio.run(run())


def test_a_function_runs_in_another_thread_only_in_an_event_loop():
    assert call_without_event_loop(threading.get_ident) == threading.get_ident()
    assert run_in_loop(lambda: call_without_event_loop(threading.get_ident)) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        run_in_loop(lambda: call_without_event_loop(lambda: 1 // 0))


def test_a_model_is_loaded(tiny_model):
    found, expected = run_in_loop(lambda: vl.load(tiny_model)).network, vl.load(tiny_model).network
    np.testing.assert_array_equal(found.frame_positions[...], expected.frame_positions[...])


@pytest.mark.slow
def test_a_run_is_trained_resumed_and_loaded(tiny_model, image_records, tmp_path):
    config = short_config(tiny_model, image_records, steps=2)
    run_in_loop(lambda: vl.train(config, tmp_path / "run"))
    run_in_loop(lambda: vl.load(tmp_path / "run"))
    vl.train(config, tmp_path / "expected")
    assert losses(tmp_path / "run") == losses(tmp_path / "expected")
