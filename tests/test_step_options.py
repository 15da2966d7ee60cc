"""The train step's compiler options."""

import jax
import jax.numpy as jnp
import pytest

from vllama_jax import sharding
from vllama_jax.train import step as train_step
from vllama_jax.train.state import TrainState


def test_the_step_is_compiled_with_the_options_of_its_devices(monkeypatch):
    """XLA refuses an option that it does not know, when it compiles and not before."""
    asked = []

    def unknown_option(platform, program):
        asked.append((platform, program))
        return {"xla_no_such_option": "true"}

    monkeypatch.setattr(train_step, "compiler_options", unknown_option)
    place = jax.sharding.NamedSharding(sharding.make_mesh(data=8), jax.sharding.PartitionSpec())
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=place), {}, ())
    lowered = train_step.jit_step(lambda state, frozen, batch: (state, {"loss": frozen}), state).lower(state, 1.0, {})
    with pytest.raises(Exception, match="xla_no_such_option"):
        lowered.compile()
    assert asked == [("cpu", "train_step")]
