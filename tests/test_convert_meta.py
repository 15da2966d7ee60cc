"""Meta's shards of LLaMA convert to the weights that transformers converts them to."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import convert_command, expect_one_line, read_hashes
from safetensors.numpy import load_file, save_file
from written_weights import Hostile

from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli import main

WIDTH, LAYERS, HEADS, KEY_HEADS, HEAD_DIM = 64, 3, 4, 2, 16
LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
WHOLE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
SPLIT_ON_1 = ("wo.weight", "w2.weight", "tok_embeddings.weight")


def transformers_name(name: str) -> str:
    segments = name.split(".", 2)
    return f"model.layers.{segments[1]}.{LAYER[segments[2]]}" if segments[0] == "layers" else WHOLE[name]


def transformers_permute(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Permute query and key projections as convert_llama_weights_to_hf.py does."""
    if not name.endswith(("wq.weight", "wk.weight")):
        return weight
    heads = HEADS if name.endswith("wq.weight") else KEY_HEADS
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def metas(tiny_files) -> dict[str, torch.Tensor]:
    """Random weights under Meta's names, in the tiny model's shapes; rows of queries and keys have Meta's order."""
    held = load_file(tiny_files["llama"] / "model.safetensors")
    names = [f"layers.{layer}.{name}" for layer in range(LAYERS) for name in LAYER] + list(WHOLE)
    return {name: torch.from_numpy(held[transformers_name(name)]).half() for name in names}


def write_meta(directory: Path, like: Path, weights: dict[str, torch.Tensor], shards: int, rows: bool = False) -> Path:
    """Write shards in Meta's layout; `rows` divides the embedding along the vocabulary, as in LLaMA 3."""
    directory.mkdir()
    shutil.copyfile(like / "tokenizer.model", directory / "tokenizer.model")
    (directory / "checklist.chk").write_text("0  consolidated.00.pth")
    params = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KEY_HEADS, "norm_eps": 1e-6}
    (directory / "params.json").write_text(json.dumps(params | {"vocab_size": -1, "multiple_of": 32}))
    for shard in range(shards):
        held = {"rope.freqs": 1.0 / (10000.0 ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))}
        for name, weight in weights.items():
            axis = 1 if name.endswith(SPLIT_ON_1) and not (rows and "tok" in name) else 0
            held[name] = weight if weight.ndim == 1 else weight.chunk(shards, axis)[shard].clone()
        torch.save(held, directory / f"consolidated.{shard:02}.pth")
    return directory


@pytest.fixture(scope="module")
def expected(tiny_files, metas, tmp_path_factory) -> Path:
    """The model made from transformers' conversion of the same weights."""
    folder = tmp_path_factory.mktemp("transformers")
    llama = shutil.copytree(tiny_files["llama"], folder / "llama")
    tensors = {transformers_name(name): transformers_permute(name, weight).numpy() for name, weight in metas.items()}
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, llama / "model.safetensors")
    main(convert_command(tiny_files | {"llama": llama}, folder / "model"))
    return folder / "model"


@pytest.mark.parametrize(("shards", "rows"), [(1, False), (2, False), (2, True)])
def test_shards_convert_as_transformers_converts_them(tiny_files, metas, expected, tmp_path, shards, rows):
    directory = write_meta(tmp_path / "7B", tiny_files["llama"], metas, shards, rows)
    main(convert_command(tiny_files | {"llama": directory}, tmp_path / "model"))
    assert read_hashes(tmp_path / "model") == read_hashes(expected)
    made, theirs = open_model(tmp_path / "model").config, open_model(expected).config
    assert made == dataclasses.replace(theirs, llama=dataclasses.replace(theirs.llama, max_length=2048))
    assert len(open_model(tmp_path / "model").manifest["sources"]["llama"]) == shards


def test_found_in_a_directory_with_the_tokenizer_beside_it(tiny_files, metas, expected, tmp_path, capsys):
    release = tmp_path / "release"
    release.mkdir()
    directory = write_meta(release / "7B", tiny_files["llama"], metas, 2)
    (directory / "tokenizer.model").rename(release / "tokenizer.model")
    for kind in ("eva_vit", "blip2", "imagebind", "vl", "al"):
        shutil.copy(tiny_files[kind], release)
    main(convert_command({}, tmp_path / "model", str(release), "--config", str(tiny_files["config"])))
    assert read_hashes(tmp_path / "model") == read_hashes(expected)
    assert f"{directory}: LLaMA weights, as --llama" in capsys.readouterr().out


@pytest.mark.slow
def test_a_delta_on_metas_shards_is_converted_and_verified(tiny_files, metas, expected, tmp_path, capsys):
    directory = write_meta(tmp_path / "7B", tiny_files["llama"], metas, 2)
    delta = shutil.copytree(tiny_files["llama"], tmp_path / "delta")
    held = load_file(delta / "model.safetensors")
    save_file({name: np.zeros_like(tensor, np.float16) for name, tensor in held.items()}, delta / "model.safetensors")
    paths = tiny_files | {"llama": directory, "delta": delta}
    main(convert_command(paths, tmp_path / "model"))
    assert read_hashes(tmp_path / "model") == read_hashes(expected)
    capsys.readouterr()
    *sources, _, _ = convert_command(paths, tmp_path)[1:]
    main(["verify", str(tmp_path / "model"), *sources, "--weights-only"])
    assert "bit-exactly equal to the PyTorch files" in capsys.readouterr().out
    main(["verify", str(tmp_path / "model"), *sources, "--tokens", "64"])
    assert "reproduces its PyTorch files" in capsys.readouterr().out


COUNT = "must be an integer from 1 to 16777216, not"
ABOVE = "must be a number above 0 and at most"


def params(**fields):
    def change(directory: Path) -> None:
        held = json.loads((directory / "params.json").read_text())
        (directory / "params.json").write_text(json.dumps(held | fields))

    return change


def reshard(change):
    def act(directory: Path) -> None:
        held = torch.load(directory / "consolidated.01.pth", weights_only=True)
        change(held)
        torch.save(held, directory / "consolidated.01.pth")

    return act


CORRUPTIONS = {
    "first shard": (lambda d: (d / "consolidated.00.pth").unlink(), "consolidated.00.pth is missing; download all"),
    "last shard": (lambda d: (d / "consolidated.01.pth").unlink(), "q_proj.weight is [32, 64], but [64, 64] is needed"),
    "no shard": (lambda d: [path.unlink() for path in d.glob("*.pth")], "no config.json; --llama takes a Hugging Face"),
    "empty shard": (lambda d: (d / "consolidated.01.pth").write_bytes(b""), "consolidated.01.pth: the file is empty"),
    "tensor gone": (reshard(lambda held: held.pop("norm.weight")), "consolidated.01.pth has other tensors than"),
    "tensor cut": (
        reshard(lambda held: held.update({"output.weight": torch.ones(3, 64).half()})),
        "consolidated.01.pth has other tensors than",
    ),
    "other replica": (
        reshard(lambda held: held.update({"norm.weight": held["norm.weight"] + 1})),
        "consolidated.01.pth and consolidated.00.pth differ in norm.weight; download them again",
    ),
    "no width": (params(dim=None), f"params.json: dim {COUNT} None"),
    "no layers": (params(n_layers=0), f"params.json: n_layers {COUNT} 0"),
    "heads": (params(n_heads=5), "params.json: a width of 64 cannot have 5 heads"),
    "absurd layers": (params(n_layers=10**9), f"n_layers {COUNT} 1000000000"),
    "key heads": (params(n_kv_heads=4), "k_proj.weight is [32, 64], but [64, 64] is needed"),
    "no epsilon": (
        lambda d: (d / "params.json").write_text('{"dim":64,"n_layers":3,"n_heads":4}'),
        f"norm_eps {ABOVE} 1, not None",
    ),
    "scaling": (params(use_scaled_rope=True), "the parameters of its rotary scaling are missing"),
    "other base": (params(rope_theta=5e5), "inv_freq has other values than these files imply"),
    "no JSON": (lambda d: (d / "params.json").write_text("{"), "params.json: not JSON"),
    "tokenizer": (lambda d: (d / "tokenizer.model").unlink(), "no tokenizer in"),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_a_directory_without_meta_shards_is_refused(tiny_files, metas, tmp_path, corrupt):
    directory = write_meta(tmp_path / "7B", tiny_files["llama"], metas, 2)
    act, message = CORRUPTIONS[corrupt]
    act(directory)
    with pytest.raises(SystemExit) as stopped:
        main(convert_command(tiny_files | {"llama": directory}, tmp_path / "model"))
    assert message in stopped.value.code
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("shard", [0, 1])
def test_a_hostile_shard_is_refused_without_running_it(tiny_files, metas, tmp_path, shard):
    directory = write_meta(tmp_path / "7B", tiny_files["llama"], metas, 2)
    path = directory / f"consolidated.0{shard}.pth"
    torch.save({"norm.weight": Hostile(tmp_path / "marker")}, path)
    text = expect_one_line(tiny_files | {"llama": directory}, tmp_path)
    assert f"{path}: refused: its pickle refers to {os.system.__module__}.system" in text
    assert not (tmp_path / "marker").exists()
