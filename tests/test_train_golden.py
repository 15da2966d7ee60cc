"""Training compared with the original's: losses, gradients, AdamW steps and learning rates (../shared/golden/train).

Losses agree within 1e-5, gradients within 1e-4 of each tensor's largest value. The true gradient of a key bias is zero
(attention is invariant to a shift of all scores): the original has noise there, which Adam turns into steps.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vllama_jax import convert
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.checkpoints.restore import restore_weights
from vllama_jax.data.config import DatasetConfig
from vllama_jax.data.tokenization import pad_texts
from vllama_jax.nn.network import abstract_network
from vllama_jax.text.prompts import Media
from vllama_jax.text.templates import find_caption_template, find_conversation_template
from vllama_jax.text.training import encode_caption, label_conversation
from vllama_jax.train.config import AUDIO_BRANCH, VISION_BRANCH, OptimConfig, TrainConfig
from vllama_jax.train.optim import has_weight_decay, learning_rate, make_optimizer
from vllama_jax.train.state import AbstractModel, init_state, select_paths
from vllama_jax.train.step import loss_sum, make_step

CLIPS = ("birthday", "dog_barking", "boat")
CAPTIONS = [
    f"s1_{branch}_{case}"
    for branch in ("vision", "audio")
    for case in ("noprompt", "prompt_vicuna", "prompt_llama2", "prompt_llama2_real_newlines", "image_noprompt")
]
CONVERSATIONS = [
    f"s2_{branch}_{case}"
    for branch in ("vision", "audio")
    for case in ("vicuna", "llama_v2", "llava_vicuna", "llava_llama_v2")
]


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "train/train.json").read_text())


class Setting:
    """The golden model with the trainable and the frozen parameters of a branch."""

    def __init__(self, model, branch: str, **options):
        self.directory = open_model(model)
        self.abstract_model = AbstractModel(abstract_network(self.directory.config, "float32"))
        trainable = VISION_BRANCH if branch == "vision" else AUDIO_BRANCH
        dataset = DatasetConfig(path="unused")
        defaults = {"steps": 10, "batch_size": 3, "dropout": 0.0}
        self.config = TrainConfig(
            model=str(model), branch=branch, trainable=trainable, datasets=(dataset,), **{**defaults, **options}
        )
        trainable_paths = set(select_paths(list(self.abstract_model.variables), trainable))
        weights = restore_weights(
            self.directory, {path: variable.get_value() for path, variable in self.abstract_model.variables.items()}
        )
        self.weights = {path: weights.pop(path) for path in sorted(trainable_paths)}
        self.frozen = weights

    @functools.cached_property
    def loss_and_gradients(self):
        def mean(weights, frozen, batch):
            loss, count = loss_sum(self.abstract_model.build({**frozen, **weights}), batch, self.config, None)
            return loss / count

        return jax.jit(jax.value_and_grad(mean))

    def expected(self, arrays) -> dict[str, np.ndarray]:
        """Convert tensors under torch's names (weights or gradients) to ours, by path."""
        kind = "vl" if self.config.branch == "vision" else "al"
        ours = {}
        for rule in convert.rule_tables(self.directory.config, [kind])[kind]:
            if all(name in arrays for names in rule.names() for name in names):
                rows = [rule.transform.to_jax(*(arrays[name] for name in names)) for names in rule.names()]
                ours[rule.target] = rows[0] if rule.layers is None else np.stack(rows)
        assert ours.keys() == self.weights.keys()
        return ours


@pytest.fixture(scope="module")
def settings(golden_model):
    return functools.cache(lambda branch: Setting(golden_model, branch))


def media_length(branch: str) -> int:
    return 32 if branch == "vision" else 8


def caption_batch(golden, setting, case, branch, *, image: bool) -> dict:
    words = case["text_input"]
    frames = [np.load(golden / f"media/{clip}_video.npz")["frames_uint8_thwc"] for clip in CLIPS[: len(words)]]
    if image:
        dog = np.load(golden / "media/dog_image.npz")["resized_uint8_hwc"]
        frames = [dog[None], np.load(golden / "media/boat_video.npz")["frames_uint8_thwc"][:1]]
    template, instruction = find_caption_template("plain"), None
    if case["prompt_list"]:
        prompt = case["prompt_list"][0]
        name = "vicuna" if "###" in prompt else "llama_2_literal" if r"\n" in prompt else "llama_2"
        template = find_caption_template(name)
        before, after = ("".join(texts) for texts in template.wrap)
        instruction = prompt.removeprefix(before).removesuffix(after)
        instruction = instruction.removeprefix("<Image><ImageHere></Image> ")
    tokenizer, many = setting.directory.tokenizer, media_length(branch)
    media = Media("image" if image else "video")
    texts = [encode_caption(tokenizer, template, text, media, instruction, many, case["max_txt_len"]) for text in words]
    return one_shape(frames, texts, many)


def conversation_batch(golden, setting, case, branch, name) -> dict:
    template = find_conversation_template("vicuna" if "vicuna" in name else "llama_2")
    texts, frames = [], []
    if "llava" in name:
        (entry,) = json.loads((golden / "train/s2_llava_annotations.json").read_text())
        values = [message["value"] for message in entry["conversations"]]
        at = values[0].index("<image>")
        values[0] = values[0].replace("<image>", "")
        examples = [(list(zip(values[::2], values[1::2], strict=True)), Media("image"), at)]
        frames = [np.load(golden / "media/dog_image.npz")["resized_uint8_hwc"][None]]
    else:
        entries = json.loads((golden / "train/s2_annotations.json").read_text())[:2]
        found = json.loads((golden / "media/media.json").read_text())
        examples = []
        for entry in entries:
            clip = entry["video"].removesuffix(".mp4")
            seconds = tuple(index / found[clip]["fps"] for index in found[clip]["indices"])
            examples.append(([(qa["q"], qa["a"]) for qa in entry["QA"]], Media("video", timestamps=seconds), 0))
            frames.append(np.load(golden / f"media/{clip}_video.npz")["frames_uint8_thwc"])
    many = media_length(branch)
    for turns, media, at in examples:
        texts.append(label_conversation(setting.directory.tokenizer, template, turns, media, at, many, 512))
    return one_shape(frames, texts, many)


def one_shape(frames, texts, many) -> dict:
    """Split a batch into batches of three rows of one length, padded with rows without labels.

    Few programs are then compiled.
    """
    missing = 3 - len(texts)
    frames, texts = [*frames, *frames[:1] * missing], [*texts, *texts[:1] * missing]
    masked = range(3 - missing, 3)
    return {"frames": np.stack(frames), **pad_texts(texts, 240, many, masked=masked)}


def batch_of(golden, setting, cases, name) -> dict:
    branch = name.split("_")[1]
    if name.startswith("s1"):
        return caption_batch(golden, setting, cases[name], branch, image="image" in name)
    return conversation_batch(golden, setting, cases[name], branch, name)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * ("image" in name or "llava" in name))
        for name in CAPTIONS + CONVERSATIONS
    ],
)
def test_losses_and_gradients_equal_the_originals(golden, settings, cases, name):
    setting = settings(name.split("_")[1])
    batch = batch_of(golden, setting, cases, name)
    loss, gradients = setting.loss_and_gradients(setting.weights, setting.frozen, batch)
    assert float(loss) == pytest.approx(cases[name]["loss"], rel=1e-5)
    stored = golden / f"train/{name}_grads.npz"
    if not stored.exists():
        return
    expected = setting.expected(np.load(stored))
    for path, gradient in gradients.items():
        if path.endswith("key/bias"):
            continue
        reference = expected[path]
        assert np.abs(gradient - reference).max() <= 1e-4 * np.abs(reference).max(), path


@pytest.mark.slow
@pytest.mark.parametrize(("branch", "grad_accum_steps"), [("vision", 1), ("audio", 3)])
def test_three_steps_of_adamw_equal_the_originals(golden, golden_model, cases, branch, grad_accum_steps):
    case = cases[f"s1_{branch}_adamw3"]
    hyper = case["hyper"]
    optim = OptimConfig(
        lr=hyper["init_lr"], min_lr=hyper["min_lr"], warmup_lr=hyper["warmup_lr"], warmup_steps=hyper["warmup_steps"]
    )
    steps = hyper["iters_per_epoch"] * hyper["max_epoch"]
    setting = Setting(golden_model, branch, optim=optim, steps=steps, grad_accum_steps=grad_accum_steps)
    batch = batch_of(golden, setting, cases, f"s1_{branch}_noprompt")
    optimizer = make_optimizer(optim, steps)
    step = jax.jit(make_step(setting.config, setting.abstract_model, optimizer))
    state = init_state(setting.weights, optimizer)
    for loss, lr in zip(case["losses"], case["lrs"], strict=True):
        state, metrics = step(state, setting.frozen, batch)
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
        assert float(metrics["lr"]) == pytest.approx(lr, abs=1e-9)
    expected = setting.expected(np.load(golden / f"train/s1_{branch}_adamw3_params.npz"))
    gradients = setting.expected(np.load(golden / f"train/s1_{branch}_noprompt_grads.npz"))
    compared = [path for path in state.weights if not path.endswith("key/bias")]
    errors = np.concatenate([np.abs(state.weights[path] - expected[path]).ravel() for path in compared])
    relative = np.concatenate([(np.abs(gradients[path]) / np.abs(gradients[path]).max()).ravel() for path in compared])
    assert errors.mean() <= 1e-6
    assert (relative[errors > 1e-4] < 1e-5).all()
    assert (errors > 1e-4).mean() <= 1e-4


def test_learning_rates_equal_the_originals(golden):
    for table in json.loads((golden / "train/lr_table.json").read_text()).values():
        hyper = table["hyper"]
        cfg = OptimConfig(
            lr=hyper["init_lr"],
            min_lr=hyper["min_lr"],
            warmup_lr=hyper["warmup_lr"],
            warmup_steps=hyper["warmup_steps"],
        )
        steps = hyper["max_epoch"] * hyper["iters_per_epoch"]
        for step, lr in table["lr_at_global_step"]:
            assert float(learning_rate(cfg, steps, jnp.int32(step))) == pytest.approx(lr, abs=1e-9)


@pytest.mark.parametrize("branch", ["vision", "audio"])
def test_weight_decay_applies_to_the_originals_parameters(settings, cases, branch):
    decayed, kept = (group["params"] for group in cases[f"optim_groups_{branch}"])
    setting = settings(branch)
    kind = "vl" if branch == "vision" else "al"
    for rule in convert.rule_tables(setting.directory.config, [kind])[kind]:
        for name in (name for names in rule.names() for name in names):
            assert name in (decayed if has_weight_decay(rule.target) else kept), name
    assert len(decayed) + len(kept) == cases[f"s1_{branch}_noprompt"]["trainable"]


@pytest.mark.slow
@pytest.mark.parametrize("branch", ["vision", "audio"])
def test_dropout_changes_the_loss_as_the_originals_does(golden, golden_model, cases, branch):
    """Its mean and standard deviation over 100 seeds are stored, because masks cannot be equal."""
    statistics = json.loads((golden / "extra/extra.json").read_text())["train_mode_loss"][branch]
    setting = Setting(golden_model, branch, dropout=0.1)
    batch = batch_of(golden, setting, cases, f"s1_{branch}_noprompt")
    from vllama_jax.nn.dropout import Dropout
    from vllama_jax.train.step import run_encoders

    network = setting.abstract_model.build({**setting.frozen, **setting.weights})
    features = jax.jit(lambda network, batch: run_encoders(network, branch, batch))(network, batch)
    cached = {**{name: value for name, value in batch.items() if name != "frames"}, "features": features}

    @jax.jit
    def loss(network, key):
        total, count = loss_sum(network, cached, setting.config, Dropout(key, 0.1))
        return total / count

    losses = np.array([float(loss(network, key)) for key in jax.random.split(jax.random.key(0), 60)])
    error = statistics["std"] / np.sqrt(60) + statistics["std"] / np.sqrt(100)
    assert abs(losses.mean() - statistics["mean"]) < 3 * error
    assert 0.7 < losses.std() / statistics["std"] < 1.4
