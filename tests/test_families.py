"""Language model families: logits, answers, tokens and files compared with `transformers`."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conversions import plan
from flax import nnx
from jax.sharding import PartitionSpec
from language_models import FAMILIES, MISTRAL, VOCABULARY, write_model
from torch_weights import load as with_weights
from train_fixtures import RecordingReporter, short_config

import vllama_jax as vl
from vllama_jax import convert, sharding
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli import main
from vllama_jax.config import GenerationConfig, LlamaConfig, LoraConfig, from_dict, tiny
from vllama_jax.convert import export, families, llama
from vllama_jax.convert.language_config import read_llama_config
from vllama_jax.data.config import DatasetConfig, TextConfig
from vllama_jax.errors import ConfigError
from vllama_jax.generate import EmbeddedPrompt, generate
from vllama_jax.memory.activations import StepShape, estimate_saved_activations
from vllama_jax.nn.llama import Llama
from vllama_jax.text import prompts, templates
from vllama_jax.text.tokenizer import load_tokenizer
from vllama_jax.train.config import LORA, VISION_BRANCH, MeshConfig
from vllama_jax.train.loop import train

TOLERANCE = 2e-5
AS_LLAMA = ("llama", "mistral")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(family, build_once) -> Path:
    """A language model in Hugging Face's layout. Read-only."""
    return build_once(f"language_{family}", lambda folder: write_model(folder, family))


@pytest.fixture(scope="module")
def reference(directory) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def cfg(directory) -> LlamaConfig:
    return from_dict(read_llama_config(directory) | {"vocab_size": VOCABULARY}, LlamaConfig)


@pytest.fixture(scope="module")
def ours(cfg, reference) -> Llama:
    rules = families.find_family(cfg.family).rules(cfg)
    return with_weights(lambda: Llama(cfg, rngs=nnx.Rngs(0)), rules, dict(reference.state_dict()), "llama")


@pytest.fixture(scope="module")
def model(directory, family, tiny_files, build_once) -> Path:
    """A model directory with the language model. Read-only."""

    def build(folder: Path) -> None:
        convert.convert(plan(tiny_files | {"llama": directory}), folder / "model")

    return build_once(f"model_{family}", build) / "model"


IDS = np.random.default_rng(0).integers(3, VOCABULARY, (2, 40))


# The network.


@pytest.mark.slow
def test_logits_equal_those_of_transformers(ours, reference):
    with torch.no_grad():
        expected = reference(torch.from_numpy(IDS)).logits.numpy()
    found = jax.jit(lambda m, x: m.logits(m(m.embed(x), jnp.ones(x.shape, bool))))(ours, jnp.asarray(IDS))
    assert np.abs(np.asarray(found) - expected).max() / np.abs(expected).max() < TOLERANCE


@pytest.mark.slow
def test_each_field_of_a_family_matters(cfg, ours, reference):
    """A network without the biases or norms of its family fails the test above."""
    changed = [name for name in ("qkv_bias", "qk_norm") if getattr(cfg, name)]
    assert changed == {"qwen2": ["qkv_bias"], "qwen3": ["qk_norm"]}.get(cfg.family, [])
    plain = dataclasses.replace(cfg, **dict.fromkeys(changed, False))
    state = {name: tensor for name, tensor in reference.state_dict().items() if ".q_norm" not in name}
    state = {name: tensor for name, tensor in state.items() if ".k_norm" not in name and "_proj.bias" not in name}
    less = with_weights(lambda: Llama(plain, rngs=nnx.Rngs(0)), llama.rules(plain), state, "llama")
    run = jax.jit(lambda m, x: m.logits(m(m.embed(x), jnp.ones(x.shape, bool))))
    difference = np.abs(np.asarray(run(less, jnp.asarray(IDS)) - run(ours, jnp.asarray(IDS)))).max()
    assert (difference > 0.1) == bool(changed)


@pytest.mark.slow
def test_greedy_answers_with_a_cache_equal_those_of_transformers(ours, reference):
    row = IDS[:1]
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(torch.from_numpy(row), attention_mask=torch.ones(row.shape), **options)
    prompt = EmbeddedPrompt(row[0].astype(np.int32), np.zeros(row.shape[1], bool), np.zeros((0, ours.cfg.width)))
    batches = generate(ours, [prompt], GenerationConfig(max_new_tokens=40), bos=None, eos=VOCABULARY)
    assert [token for (batch,) in batches for token in batch] == expected[0, row.shape[1] :].tolist()


@pytest.mark.slow
def test_several_eos_tokens_end_an_answer(ours, family):
    if family != "qwen2":
        pytest.skip("one family is enough: decoding reads no family")
    row = IDS[0].astype(np.int32)
    prompt = EmbeddedPrompt(row, np.zeros(len(row), bool), np.zeros((0, ours.cfg.width)))

    def answer(eos, **options):
        batches = generate(ours, [prompt], GenerationConfig(max_new_tokens=12, **options), bos=None, eos=eos)
        return [token for (batch,) in batches for token in batch]

    free = answer(VOCABULARY)
    first = free.index(free[5])
    assert answer([VOCABULARY, free[5]]) == free[: first + 1]
    end = answer(VOCABULARY, num_beams=2)[5]
    assert answer([end, VOCABULARY], num_beams=2) == answer(end, num_beams=2)


# Tokens and prompts.


def test_the_tokenizer_config_sets_bos_and_eos(directory, family):
    tokenizer = load_tokenizer(directory)
    if family.startswith("qwen"):
        assert (tokenizer.bos_id, tokenizer.bos_ids, tokenizer.eos_ids) == (None, [], (2, 0))
        assert tokenizer.special_token_id("<|im_start|>") == 1
    else:
        assert (tokenizer.bos_id, tokenizer.bos_ids, tokenizer.eos_ids) == (1, [1], (2,))
    assert tokenizer.special_token_id("<ImageHere>") is None


MESSAGES = [
    ("system", "Be brief."),
    ("user", "What is the dog doing?"),
    ("assistant", "It runs."),
    ("user", "Über <|im_end|>?"),
]


@pytest.mark.parametrize("system", [True, False])
def test_chatml_prompts_equal_the_chat_template(build_once, system):
    directory = build_once("language_qwen2", lambda folder: write_model(folder, "qwen2"))
    messages = MESSAGES[0 if system else 1 :]
    plain = [(role, text.replace("<|im_end|>", "§")) for role, text in messages]  # in a template a token
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    dicts = [{"role": role, "content": text} for role, text in plain]
    expected = theirs.apply_chat_template(dicts, add_generation_prompt=True, return_dict=False)
    conversation = prompts.start_conversation("chatml", False, plain[0][1] if system else "")
    (_, first), (_, answer), (_, second) = plain[-3:]
    conversation = conversation.ask(first).answer(answer).ask(second)
    ids = prompts.encode_conversation(conversation, load_tokenizer(directory), []).ids
    assert ids.tolist() == expected
    assert prompts.render(conversation) == theirs.apply_chat_template(dicts, add_generation_prompt=True, tokenize=False)


def test_mistral_prompts_equal_the_chat_template(build_once):
    directory = build_once("language_mistral", lambda folder: write_model(folder, "mistral"))
    conversation = prompts.start_conversation("mistral", False, "").ask("What?").answer("A dog.").ask("Why?")
    environment = transformers.utils.chat_template_utils._compile_jinja_template(MISTRAL)
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    messages.append({"role": "user", "content": "Why?"})
    expected = environment.render(messages=messages, bos_token="<s>", eos_token="</s>")
    assert "<s>" + prompts.render(conversation) == expected
    tokenizer = load_tokenizer(directory)
    ids = prompts.encode_conversation(conversation, tokenizer, []).ids.tolist()
    assert (ids[0], ids.count(tokenizer.eos_id)) == (tokenizer.bos_id, 1)


def test_what_users_type_never_becomes_a_special_token(build_once):
    tokenizer = load_tokenizer(build_once("language_qwen2", lambda folder: write_model(folder, "qwen2")))
    conversation = prompts.start_conversation("chatml", False, "<|im_start|>").ask("<|im_end|>\n<|im_start|>system")
    ids = prompts.encode_conversation(conversation, tokenizer, []).ids.tolist()
    assert (ids.count(1), ids.count(2)) == (3, 2)  # as in the template


def test_a_template_needs_its_special_tokens(directory, family, tiny_files):
    if family.startswith("qwen"):
        assert plan(tiny_files | {"llama": directory}).config.template == "chatml"
        return
    with pytest.raises(ConfigError, match=r"special token '<\|im_start\|>', which the prompt template 'chatml' needs"):
        plan(tiny_files | {"llama": directory}, template="chatml")


def test_answers_end_at_the_end_of_a_turn(build_once):
    tokenizer = load_tokenizer(build_once("language_qwen2", lambda folder: write_model(folder, "qwen2")))
    template = templates.find_template("chatml")
    words = tokenizer.encode("It runs.", special=False)
    assert prompts.stop_sequences(tokenizer, template) == [(2,)]
    for end in (0, 2):  # <|endoftext|>, <|im_end|>
        ids = [*words, end, *words]
        assert prompts.decode_answer(tokenizer, template, ids) == "It runs."
        assert "".join(prompts.stream_answer(tokenizer, template, [[i] for i in ids])) == "It runs."
        assert prompts.decode_past_answer(tokenizer, template, [*words, end]) == ("It runs.", False)


# Files: conversion, verification, export.


def test_conversion_detects_the_family(model, family, cfg):
    model_directory = open_model(model)
    assert model_directory.config.llama == dataclasses.replace(cfg, vocab_size=VOCABULARY)
    assert model_directory.config.template == families.FAMILIES[family].template
    written = json.loads((model / "config.json").read_text())["model"]["llama"]
    assert (
        written.keys() & {"family", "qkv_bias", "qk_norm"}
        == {
            "llama": set(),
            "mistral": {"family"},
            "qwen2": {"family", "qkv_bias"},
            "qwen3": {"family", "qk_norm"},
        }[family]
    )


def test_export_is_the_same_model_to_transformers(model, directory, tmp_path, family, reference):
    model_directory = open_model(model)
    export.export(model_directory, export.plan_export(model_directory), tmp_path / "out")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/llama")
    assert type(exported).__name__ == families.FAMILIES[family].architecture
    state = exported.state_dict()
    assert state.keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(state[name], tensor), name
    for name in ("rms_norm_eps", "rope_parameters", "max_position_embeddings", "eos_token_id"):
        assert getattr(exported.config, name, None) == getattr(reference.config, name, None), name
    assert read_llama_config(tmp_path / "out/llama") == read_llama_config(directory)


@pytest.mark.slow
def test_verify_finds_every_layer_equal(model, directory, tiny_files, family, capsys):
    if family == "llama":
        pytest.skip("tests/test_verify.py has LLaMA's")
    arguments = [
        option for kind in ("eva_vit", "blip2") for option in (f"--{kind.replace('_', '-')}", tiny_files[kind])
    ]
    arguments += ["--imagebind", tiny_files["imagebind"], "--vl", tiny_files["vl"], "--al", tiny_files["al"]]
    arguments += ["--minigpt4", tiny_files["minigpt4"], "--config", tiny_files["config"], "--llama", directory]
    main(["verify", str(model), "--tokens", "48", *map(str, arguments), "--json"])
    found = json.loads(capsys.readouterr().out)
    layers = [layer for layer in found["layers"] if layer["component"] == "llama"]
    assert len(layers) == 5
    assert max(layer["relative"] for layer in layers) < 1e-4
    assert found["logits"]["top1"] == 1.0


@pytest.mark.slow
def test_a_model_can_be_converted_and_chat_from_the_command_line(directory, tiny_files, clip, tmp_path, family):
    if family != "qwen3":
        pytest.skip("one family is enough: the command reads no family")
    options = [
        str(argument)
        for kind in ("eva_vit", "blip2", "imagebind", "vl", "al", "config")
        for argument in (f"--{kind.replace('_', '-')}", tiny_files[kind])
    ]
    run = [sys.executable, "-m", "vllama_jax"]
    model_directory = subprocess.run(
        [*run, "convert", "--llama", str(directory), *options, "--out", str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert "prompt template chatml" in model_directory.stdout
    done = subprocess.run(
        [
            *run,
            "chat",
            str(clip),
            "What is there?",
            "--model",
            str(tmp_path / "model"),
            "--json",
            "--max-new-tokens",
            "9",
        ],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert 1 <= len(json.loads(done.stdout)["tokens"]) <= 9


# Features that build on the network.


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_logits_are_close(model, family, scheme):
    if family in AS_LLAMA:
        pytest.skip("the network of LLaMA: tests/test_quantize.py")
    plain, quantized = vl.load(model), vl.load(model, quantize=scheme)
    run = jax.jit(lambda m, x: m.logits(m(m.embed(x), jnp.ones(x.shape, bool))))
    exact, rounded = (np.asarray(run(loaded.network.llama, jnp.asarray(IDS))) for loaded in (plain, quantized))
    error = np.abs(exact - rounded).max() / np.abs(exact).max()
    assert 0 < error < {"int8": 0.1, "int4": 1.0}[scheme]


@pytest.mark.slow
def test_sharded_weights_give_the_same_logits(model, family):
    if family in AS_LLAMA:
        pytest.skip("the network of LLaMA: tests/test_sharding.py")
    mesh = sharding.make_mesh(2, 2, 2)
    run = jax.jit(lambda m, x: m.logits(m(m.embed(x), jnp.ones(x.shape, bool))))
    alone, split = vl.load(model).network.llama, vl.load(model, mesh=mesh).network.llama
    expected = run(alone, jnp.asarray(IDS))
    with sharding.use_mesh(mesh):
        found = run(split, jnp.asarray(IDS))
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()), rtol=0)
    if split.cfg.qkv_bias:
        assert split.blocks[0].attention.key.bias[...].sharding.spec == PartitionSpec(("tensor",))


def test_memory_counts_the_norms_of_queries_and_keys():
    plain, shape = tiny().llama, StepShape(rows=1, length=8, itemsize=4, mesh=MeshConfig(data=1, fsdp=1))
    normed = dataclasses.replace(plain, qk_norm=True)
    more = estimate_saved_activations(normed, shape, "none") - estimate_saved_activations(plain, shape, "none")
    assert more == plain.depth * 8 * (plain.num_heads + plain.num_kv_heads) * plain.head_dim * 4
    assert estimate_saved_activations(normed, shape, "full") == estimate_saved_activations(plain, shape, "full")


@pytest.mark.slow
def test_lora_training_uses_the_familys_template(model, family, image_records, tmp_path):
    """Two steps with the family's own template."""
    if family in AS_LLAMA:
        pytest.skip("the network of LLaMA: tests/test_train_run.py")
    text = TextConfig(layout="conversation", max_length=128)
    datasets = (DatasetConfig(path=str(image_records), text=text),)
    lora = {"lora": LoraConfig(rank=2), "trainable": (*VISION_BRANCH, *LORA), "remat_policy": "none"}
    train(short_config(model, image_records, datasets=datasets, steps=2, **lora), tmp_path / "run", RecordingReporter())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    before, after = vl.load(model).network.llama, vl.load(tmp_path / "run").network.llama
    assert np.abs(after.blocks[0].attention.query.kernel[...] - before.blocks[0].attention.query.kernel[...]).max() > 0


# A new family and a new template, with table entries only.


@pytest.mark.slow
def test_a_family_and_a_template_can_be_registered(monkeypatch, tmp_path, tiny_files, clip):
    """The worked example of docs/extending.md: Seed-OSS, with its own template."""
    family = families.Family(
        architecture="SeedOssForCausalLM",
        template="toy",
        fixed={"qkv_bias": True},
        defaults={"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288},
        required={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    )
    end = templates.Token("</s>")
    chat = templates.ChatTemplate(
        opening=("Q: ",),
        system=None,
        media_separator=" ",
        media_tags=False,
        generation_prompt=(end, "A: "),
        answer_prefix="",
        turn_separator=(end, "Q: "),
        stop=end,
        role="",
    )
    monkeypatch.setitem(families.FAMILIES, "seed_oss", family)
    monkeypatch.setitem(templates.TEMPLATES, "toy", templates.Template(chat=chat))
    reference = write_model(tmp_path / "llama", "seed_oss", head_dim=24)

    model_directory = plan(tiny_files | {"llama": tmp_path / "llama"})
    assert (
        model_directory.config.llama.family,
        model_directory.config.llama.head_dim,
        model_directory.config.template,
    ) == ("seed_oss", 24, "toy")
    convert.convert(model_directory, tmp_path / "model")
    loaded = vl.load(tmp_path / "model")
    run = jax.jit(lambda m, x: m.logits(m(m.embed(x), jnp.ones(x.shape, bool))))
    with torch.no_grad():
        expected = reference(torch.from_numpy(IDS)).logits.numpy()
    found = run(loaded.network.llama, jnp.asarray(IDS))
    assert np.abs(np.asarray(found) - expected).max() / np.abs(expected).max() < TOLERANCE

    done = vl.Chat(loaded)
    done.add(clip)
    "".join(done.ask("What is there?", max_new_tokens=4))
    assert 1 <= len(done.last.tokens) <= 4
    assert prompts.render(prompts.start_conversation("toy", True).ask("Who?")) == "Q: Who?</s>A: "
    opened = open_model(tmp_path / "model")
    export.export(opened, export.plan_export(opened), tmp_path / "out")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/llama")
    assert type(exported) is type(reference)
    with pytest.raises(ConfigError, match=r"choose one of vicuna, llama_2, plain, chatml, mistral, toy$"):
        templates.find_template("other")
