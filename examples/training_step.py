"""Write a training loop: batches of a run config, the loss and its gradients, your own optimizer; then save and chat.

    python examples/training_step.py [DIR]        (default: training_step)

Renders eight clips and makes a tiny model with random weights, as `vllama train smoke` does, so that it runs anywhere
in under a minute. To use your own data and model, set `datasets` and `model` of the TrainConfig. Writes DIR/model.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import optax
from flax import nnx

import vllama_jax as vl
from vllama_jax.configs import smoke
from vllama_jax.train import TrainConfig, batches, loss_sum

TRAINABLE = ("video_qformer", "frame_positions", "llama_proj")  # components, as `vllama inspect` lists them


def make_config(out: Path) -> TrainConfig:
    """Return a config with the clips of the smoke config, all eight in each of three steps, without random crops."""
    config = smoke.prepare(dataclasses.replace(smoke.config, steps=3, batch_size=8), out)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, min_crop_area=1.0))


def main(out: Path) -> list[float]:
    """Run three steps and return their losses."""
    config = make_config(out)
    # Initialize the trained components; take all others from the smoke model.
    plan = vl.convert.plan(files={}, base=config.model, without=TRAINABLE)
    vl.convert.convert(plan, out / "start")
    model = vl.load(out / "start", stacked=True)
    graph, weights, frozen = nnx.split(model.network, lambda path, _: path[0] in TRAINABLE, ...)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3))

    @jax.jit
    def step(weights, state, frozen, batch):
        def loss(weights):
            total, count = loss_sum(nnx.merge(graph, weights, frozen), batch, config, None)
            return total / count

        value, gradients = jax.value_and_grad(loss)(weights)
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, value

    state, losses = optimizer.init(weights), []
    for batch in batches(config):
        weights, state, value = step(weights, state, frozen, batch)
        losses.append(float(value))
        print(f"step {len(losses)}: loss {value:.4f}")

    trained = dataclasses.replace(model, network=nnx.merge(graph, weights, frozen))
    vl.save(trained, out / "model")
    chat = vl.Chat(vl.load(out / "model"), template="plain")
    print(chat.add(out / "inputs" / "clips" / "red_left.mp4"))
    print("".join(chat.ask("What moves?", max_new_tokens=20)))
    return losses


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit("usage: python examples/training_step.py [DIR]")
    main(Path(*sys.argv[1:] or ["training_step"]))
