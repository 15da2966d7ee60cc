"""AdamW compared with numpy, the learning rate at its ends, and the original's constants."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vllama_jax.train.config import OptimConfig
from vllama_jax.train.config_files import load_config
from vllama_jax.train.optim import learning_rate, make_optimizer

# Values far from the defaults, so that each of them has an effect; eps is as large as the root of the second moment.
CFG = OptimConfig(lr=0.1, min_lr=0.02, warmup_lr=0.01, warmup_steps=4, weight_decay=0.3, beta1=0.8, beta2=0.95, eps=0.5)
STEPS = 10
SHAPES = {"layer/kernel": (3, 4), "layer/bias": (4,), "norm/scale": (4,), "norm/bias": (4,), "queries": (2, 3)}
NOT_DECAYED = {"layer/bias", "norm/scale", "norm/bias"}


def random_arrays(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{path: rng.standard_normal(shape) for path, shape in SHAPES.items()} for _ in range(count)]


def adamw(weight: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    """Algorithm 2 of arXiv 1711.05101 with CFG's values: weight decay is scaled by the learning rate, not by Adam."""
    mean = square = np.zeros_like(weight)
    for step, gradient in enumerate(gradients):
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        update = mean / (1 - 0.8 ** (step + 1)) / (np.sqrt(square / (1 - 0.95 ** (step + 1))) + 0.5)
        weight = weight - rate(step) * (update + decay * weight)
    return weight


def rate(step: int) -> float:
    """Compute CFG's learning rate."""
    if step < 4:
        return 0.01 + 0.09 * step / 4
    return 0.02 + 0.08 * (1 + math.cos(math.pi * step / 10)) / 2


def updated(cfg: OptimConfig, weights: dict, gradients: list[dict]) -> dict[str, jax.Array]:
    optimizer = make_optimizer(cfg, STEPS)

    @jax.jit
    def update(weights, state, gradient):
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state

    weights = jax.tree.map(jnp.float32, weights)
    state = optimizer.init(weights)
    for gradient in gradients:
        weights, state = update(weights, state, jax.tree.map(jnp.float32, gradient))
    return weights


@pytest.mark.slow
def test_updates_equal_adamw_with_weight_decay_on_matrices_only():
    weights, *gradients = random_arrays(7)  # six updates: four of warm-up and two of the cosine
    found = updated(CFG, weights, gradients)
    for path, weight in weights.items():
        expected = adamw(weight, [gradient[path] for gradient in gradients], 0.0 if path in NOT_DECAYED else 0.3)
        np.testing.assert_allclose(found[path], expected, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_gradients_are_clipped_together_before_adam():
    weights, *gradients = random_arrays(4)
    norms = [math.sqrt(sum((part**2).sum() for part in gradient.values())) for gradient in gradients]
    limit = sorted(norms)[1] + 1e-3  # the largest of three gradients is scaled down, the other two are not
    clipped = [
        {path: part * min(1, limit / norm) for path, part in gradient.items()}
        for gradient, norm in zip(gradients, norms, strict=True)
    ]
    found = updated(dataclasses.replace(CFG, max_grad_norm=limit), weights, gradients)
    for path, expected in updated(CFG, weights, clipped).items():
        np.testing.assert_allclose(found[path], expected, rtol=1e-5, err_msg=path)
    assert not np.allclose(found["queries"], updated(CFG, weights, gradients)["queries"], rtol=1e-3)


def test_the_learning_rate_at_the_ends_of_warm_up_and_cosine():
    rates = [float(learning_rate(CFG, STEPS, step)) for step in range(STEPS + 1)]
    assert rates[:4] == pytest.approx([0.01, 0.0325, 0.055, 0.0775])  # the first step has warmup_lr
    assert rates[4] == pytest.approx(0.0723607, abs=1e-6)  # lr is never reached: the cosine started at step 0
    assert rates[5] == pytest.approx(0.06)  # half of the cosine
    assert rates[9] == pytest.approx(0.0219577, abs=1e-6)  # the last of ten updates
    assert rates[10] == pytest.approx(0.02)


def test_without_warm_up_the_first_learning_rate_is_lr():
    assert float(learning_rate(dataclasses.replace(CFG, warmup_steps=0), STEPS, 0)) == pytest.approx(0.1)


def test_defaults_are_the_originals():
    """Reference: runners/runner_base.py; train_configs/visionbranch_stage1_pretrain.yaml."""
    cfg = OptimConfig()
    assert (cfg.lr, cfg.min_lr, cfg.warmup_lr, cfg.warmup_steps) == (1e-4, 8e-5, 1e-6, 2500)
    assert (cfg.weight_decay, cfg.beta1, cfg.beta2, cfg.eps, cfg.max_grad_norm) == (0.05, 0.9, 0.999, 1e-8, 0)


# prompts/alignment_image.txt, without the media that precede each prompt.
ALIGNMENT = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)

# From train_configs/*.yaml: iters_per_epoch × max_epoch, batch_size_train × 8 GPUs, learning rates, warmup_steps.
YAMLS = {
    "vision_stage1": (2500 * 5, 32 * 8, 1e-4, 8e-5, 2500),
    "vision_stage2": (1000 * 3, 4 * 8, 3e-5, 1e-5, 1000),
    "audio_stage1": (5000 * 5, 32 * 8, 1e-4, 8e-5, 5000),
    "audio_stage2": (1000 * 3, 4 * 8, 3e-5, 1e-5, 400),
}


@pytest.mark.parametrize("name", YAMLS)
def test_built_in_run_configs_equal_the_originals(name):
    config = load_config(name)[0]
    optim = config.optim
    assert (config.steps, config.batch_size, optim.lr, optim.min_lr, optim.warmup_steps) == YAMLS[name]
    assert (optim.warmup_lr, optim.weight_decay, config.dropout, config.seed) == (1e-6, 0.05, 0.1, 42)
    assert (config.data.min_crop_area, config.data.max_crop_aspect_ratio) == (0.5, 4 / 3)
    texts = [dataset.text for dataset in config.datasets]
    if name.endswith("stage1"):
        assert [dataset.ratio for dataset in config.datasets] == [100, 24]
        assert [(text.layout, text.instructions, text.max_length) for text in texts] == [("caption", (), 32)] * 2
        assert [text.clean for text in texts] == [True, False]  # only WebVid uses blip_caption
        assert config.datasets[0].frame_sampling == "head_tail"
    else:
        assert {dataset.ratio for dataset in config.datasets} == {1.0}
        assert [text.layout for text in texts] == ["caption", "conversation", "conversation"]
        assert [text.instructions for text in texts] == [ALIGNMENT, (), ()]
        assert [text.max_length for text in texts] == [320 if name == "vision_stage2" else 512, 512, 512]
        assert {dataset.frame_sampling for dataset in config.datasets} == {"uniform"}
