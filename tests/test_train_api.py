"""`vllama_jax.train` from Python: arguments, result, reporter, and custom losses and optimizers."""

import functools
import json
import pydoc
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from train_fixtures import RecordingReporter, losses, short_config

import vllama_jax as vl
from vllama_jax.cli import main
from vllama_jax.errors import ConfigError
from vllama_jax.train import PrintReporter, batches, loss_sum
from vllama_jax.train.config import CheckpointConfig
from vllama_jax.train.custom import check_custom, describe_custom
from vllama_jax.train.state import TrainState, make_state_shardings

TRAINABLE = ("video_qformer", "frame_positions", "llama_proj")
STATEMENTS = (
    "import vllama_jax as vl; f = vl.train",
    "import vllama_jax.train.config; import vllama_jax as vl; f = vl.train",
    "from vllama_jax.train.config import TrainConfig; from vllama_jax import train as f",
    "from vllama_jax import train; from vllama_jax.train.optim import make_optimizer; f = train",
    "from vllama_jax.train import train as f",
)


@pytest.mark.slow
@pytest.mark.parametrize("statement", STATEMENTS)
def test_train_is_callable_after_any_import_order(statement):
    code = f"""{statement}
import inspect, sys
assert list(inspect.signature(f).parameters) == ["config", "out", "base", "reporter", "loss", "optimizer"]
try:
    f("config")
except TypeError as error:
    assert "train() missing 1 required positional argument: 'out'" in str(error)
else:
    raise AssertionError("it was called without `out`")
assert "jax" not in sys.modules or "optim" in {statement!r}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_on_train_begins_with_how_to_call_it():
    head, _, rest = pydoc.plain(pydoc.render_doc(vl.train)).partition("Args:")
    assert "train(config: vllama_jax.train.config.TrainConfig, out: str | pathlib.Path, *, base" in head
    assert "Train a branch, or resume the run in `out` from its last checkpoint" in head
    assert rest.lstrip().startswith("config: The run config.")


def test_the_package_lists_what_it_exports():
    assert {"train", "save", "load", "Chat", "convert"} <= set(dir(vl))
    for name in vl.__all__:
        assert getattr(vl, name) is not None
    for name in dir(vl.train):
        assert getattr(vl.train, name) is not None
    with pytest.raises(AttributeError, match=r"module 'vllama_jax.train' has no attribute 'nothing'"):
        _ = vl.train.nothing


def test_the_default_reporter_prints_the_first_and_the_last_step_and_some_between(capsys):
    metrics = {"loss": 2.0, "samples_per_second": 8.0, "waited_for_data": 0.25}
    reporter = PrintReporter(10, every=4)
    reporter.begin(2)
    for step in range(3, 11):
        reporter.step({**metrics, "step": step, **({"lr": 1e-3} if step == 3 else {})})
    assert capsys.readouterr().err.splitlines() == [
        "3/10 steps  loss 2.0000  lr 1.00e-03  8.0 samples/s  data wait 25%",
        "4/10 steps  loss 2.0000  8.0 samples/s  data wait 25%",
        "8/10 steps  loss 2.0000  8.0 samples/s  data wait 25%",
        "10/10 steps  loss 2.0000  8.0 samples/s  data wait 25%",
    ]


def test_a_loss_and_an_optimizer_are_recorded_by_name_and_by_layout():
    weights = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    lion, adam = optax.lion(1e-3), optax.adam(1e-3)
    states = {name: jax.eval_shape(optimizer.init, weights) for name, optimizer in {"lion": lion, "adam": adam}.items()}
    assert describe_custom(None, None, states["adam"]) == {}
    one = describe_custom(loss_sum, adam, states["adam"])
    assert one["loss"] == "loss_sum"
    assert one == describe_custom(loss_sum, optax.adam(1.0), states["adam"])
    assert one["optimizer"] != describe_custom(None, lion, states["lion"])["optimizer"]
    assert describe_custom(functools.partial(loss_sum), None, None) == {"loss": "partial"}
    check_custom("run", one, one)
    with pytest.raises(
        ConfigError, match=r"run: the run has another loss or optimizer \(loss was loss_sum, now the config's; optim"
    ):
        check_custom("run", one, {})


def test_optimizer_state_of_another_shape_than_its_weight_is_replicated():
    mesh = vl.sharding.make_mesh(fsdp=8)
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    weights = {"w": jnp.zeros((256, 256))}
    state = TrainState(jnp.zeros((), jnp.int32), weights, optax.adafactor(1e-3).init(weights))
    found = make_state_shardings(state, {"w": over}, mesh)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        assert (place == over) == (leaf.shape == (256, 256))
    jax.device_put(state, found)  # sums over rows or columns have fewer axes than the weight


# Complete runs.


def doubled(network, batch, config, dropout):
    """A custom loss: twice the cross-entropy."""
    total, count = loss_sum(network, batch, config, dropout)
    return 2 * total, count


@pytest.fixture(scope="module")
def config(tiny_model, image_records):
    return short_config(
        tiny_model, image_records, steps=3, checkpoint=CheckpointConfig(save_interval_steps=2), dropout=0.0
    )


@pytest.fixture(scope="module")
def custom_run(config, tmp_path_factory):
    """A run of three steps with a custom loss and a custom optimizer."""
    out = tmp_path_factory.mktemp("custom") / "run"
    return vl.train(config, out, reporter=RecordingReporter(), loss=doubled, optimizer=optax.sgd(1e-2))


@pytest.mark.slow
def test_the_result_has_the_run_and_its_last_metrics(config, custom_run):
    assert (custom_run.step, custom_run.metrics["step"]) == (3, 3)
    lines = [json.loads(line) for line in (custom_run.path / "metrics.jsonl").read_text().splitlines()]
    assert custom_run.metrics == lines[-1]
    assert "lr" not in custom_run.metrics
    vl.load(custom_run.path)
    main(["plot", str(custom_run.path)])
    again = vl.train(config, custom_run.path, reporter=RecordingReporter(), loss=doubled, optimizer=optax.sgd(1e-2))
    assert again == custom_run


@pytest.mark.slow
def test_a_custom_loss_is_trained_on(config, custom_run, tmp_path):
    plain = vl.train(config, tmp_path / "plain", optimizer=optax.sgd(2e-2))
    for (_, ours), (_, theirs) in zip(losses(custom_run.path), losses(plain.path), strict=True):
        assert ours == pytest.approx(2 * theirs, rel=1e-5), "twice the loss at half the rate are the same steps"


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_loss_or_optimizer(config, custom_run, capsys):
    refused = {
        r"loss was doubled, now the config's\); resume it by": {"optimizer": optax.sgd(1e-2)},
        r"optimizer was with state \w+, now the config's\); resume": {"loss": doubled},
        r"optimizer was with state \w+, now with state \w+\); resume": {
            "loss": doubled,
            "optimizer": optax.adam(1e-2),
        },
    }
    for message, options in refused.items():
        with pytest.raises(ConfigError, match=message):
            vl.train(config, custom_run.path, **options)


@pytest.mark.slow
def test_manual_steps_reproduce_the_losses_of_a_run(config, tmp_path):
    run = vl.train(config, tmp_path / "run", reporter=RecordingReporter(), optimizer=optax.sgd(1e-2))
    model = vl.load(config.model, "float32", stacked=True)
    graph, weights, frozen = nnx.split(model.network, lambda path, _: path[0] in TRAINABLE, ...)

    @jax.jit
    def step(weights, batch):
        def loss(weights):
            total, count = loss_sum(nnx.merge(graph, weights, frozen), batch, config, None)
            return total / count

        value, gradients = jax.value_and_grad(loss)(weights)
        return jax.tree.map(lambda weight, gradient: weight - 1e-2 * gradient, weights, gradients), value

    found = []
    for batch in batches(config):
        weights, value = step(weights, batch)
        found.append(float(value))
    assert found == pytest.approx([loss for _, loss in losses(run.path)], rel=1e-5)
