"""Values in JSON from outside: a wrong type, a negative, zero or huge number in each field is a one-line error."""

import json
import shutil
from pathlib import Path

import pytest
from conversions import plan
from tokenizers import Tokenizer, models, pre_tokenizers

from vllama_jax.checkpoints.directory import open_model
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.text.tokenizer import load_tokenizer

WRONG = {"text": '"8"', "true": "true", "list": "[8]", "object": "{}", "negative": "-5", "huge": "1" + "0" * 400}
NOT_WHOLE = {"fraction": "8.5", "zero": "0", "null": "null", "beyond floats": "1e400", "NaN": "NaN"}
NUMBERS = WRONG | {"null": "null", "zero": "0", "beyond floats": "1e400", "infinite": "Infinity"}
WHOLE = WRONG | NOT_WHOLE
OPTIONAL = {name: text for name, text in WHOLE.items() if name != "null"}
IDS = {name: text for name, text in WHOLE.items() if name != "zero"}


def cases(fields: dict[str, dict[str, str]]) -> list:
    return [
        pytest.param(name, text, id=f"{name}-{what}")
        for name, values in fields.items()
        for what, text in values.items()
    ]


def replaced(path: Path, name: str, text: str) -> None:
    """Replace the value of a field in a JSON file with this text; `a.b` is a field of an object."""
    fields = json.loads(path.read_text()) if path.exists() else {}
    keys = name.split("/")
    inner = fields
    for part in keys[:-1]:
        inner = inner.setdefault(part, {}) if isinstance(inner, dict) else inner[int(part)]
    inner[keys[-1]] = "@value@"
    path.write_text(json.dumps(fields).replace('"@value@"', text))


def assert_one_line(error: Exception, path: Path, name: str) -> None:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 400
    assert str(path) in message
    assert name.split("/")[-1] in message or "not JSON" in message


LLAMA = {
    "hidden_size": WHOLE,
    "num_hidden_layers": WHOLE,
    "num_attention_heads": WHOLE,
    "intermediate_size": WHOLE,
    "num_key_value_heads": OPTIONAL,
    "head_dim": OPTIONAL,
    "max_position_embeddings": WHOLE,
    "rms_norm_eps": NUMBERS,
    "rope_theta": NUMBERS,
    "rope_scaling/factor": NUMBERS,
    "rope_scaling/low_freq_factor": NUMBERS,
    "rope_scaling/high_freq_factor": NUMBERS,
    "rope_scaling/original_max_position_embeddings": WHOLE,
    "rope_parameters/rope_theta": NUMBERS,
    "rope_scaling": {"text": '"linear"', "true": "true", "list": "[1]", "number": "4"},
    "tie_word_embeddings": {"text": '"false"', "number": "1", "null": "null"},
    "attention_bias": {"text": '"false"', "number": "1"},
    "mlp_bias": {"text": '"false"', "null": "null"},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def llama(tiny_files, tmp_path_factory) -> Path:
    return shutil.copytree(tiny_files["llama"], tmp_path_factory.mktemp("json") / "llama")


@pytest.mark.parametrize(("name", "text"), cases(LLAMA))
def test_a_language_model_config_with_a_wrong_value_is_refused(tiny_files, llama, name, text):
    path = llama / "config.json"
    before = path.read_text()
    try:
        if name.startswith("rope_scaling/"):
            scaling = LLAMA3 | {"original_max_position_embeddings": 8192}
            path.write_text(json.dumps(json.loads(before) | {"rope_scaling": scaling}))
        replaced(path, name, text)
        with pytest.raises((ConfigError, CheckpointError)) as raised:
            plan(tiny_files | {"llama": llama})
        assert_one_line(raised.value, path, name)
    finally:
        path.write_text(before)


PARAMS = {
    "dim": WHOLE,
    "n_layers": WHOLE,
    "n_heads": WHOLE,
    "n_kv_heads": OPTIONAL,
    "norm_eps": NUMBERS,
    "rope_theta": NUMBERS,
    "use_scaled_rope": {"text": '"false"', "number": "1"},
}


@pytest.mark.parametrize(("name", "text"), cases(PARAMS))
def test_params_json_with_a_wrong_value_is_refused(tmp_path, name, text):
    from vllama_jax.convert.meta_llama import read_params

    path = tmp_path / "params.json"
    path.write_text(json.dumps({"dim": 64, "n_layers": 3, "n_heads": 4, "norm_eps": 1e-6}))
    replaced(path, name, text)
    with pytest.raises((ConfigError, CheckpointError)) as raised:
        read_params(tmp_path)
    assert_one_line(raised.value, path, name)


MODEL = {
    "model/vit/width": WHOLE,
    "model/vit/norm_eps": NUMBERS,
    "model/ln_vision_eps": NUMBERS,
    "model/image_qformer/num_queries": WHOLE,
    "model/num_frames": WHOLE,
    "model/llama/norm_eps": NUMBERS,
    "model/llama/rope_theta": NUMBERS,
    "model/llama/max_length": WHOLE,
    "model/llama/tie_embeddings": {"text": '"false"', "number": "1", "null": "null"},
    "model/imagebind/audio/num_mel_bins": WHOLE | {"below a patch": "3"},
    "model/imagebind/audio/stem_norm_eps": NUMBERS,
    "format": {"text": '"1"', "huge": "1" + "0" * 400, "negative": "-1", "list": "[1]"},
}


@pytest.mark.parametrize(("name", "text"), cases(MODEL))
def test_a_model_config_with_a_wrong_value_is_refused(tiny_model, tmp_path, name, text):
    for entry in tiny_model.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "config.json").unlink()
    shutil.copy(tiny_model / "config.json", tmp_path)
    replaced(tmp_path / "config.json", name, text)
    with pytest.raises((ConfigError, CheckpointError)) as raised:
        open_model(tmp_path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


# Tokenizers.

SENTENCEPIECE = {
    ("added_tokens.json", "<x>"): IDS,
    ("tokenizer_config.json", "added_tokens_decoder/-5"): {"object": '{"content": "<x>"}'},
    ("tokenizer_config.json", "added_tokens_decoder/a"): {"object": '{"content": "<x>"}'},
    ("tokenizer_config.json", "added_tokens_decoder/" + "9" * 400): {"object": '{"content": "<x>"}'},
    ("tokenizer_config.json", "added_tokens_decoder/512"): {
        "empty": '{"content": ""}',
        "number": '{"content": 5}',
        "list": "[1]",
        "null": "null",
    },
    ("tokenizer_config.json", "bos_token"): {"number": "5", "list": '["<s>"]', "true": "true", "object": "{}"},
    ("special_tokens_map.json", "eos_token"): {"number": "5", "true": "true", "object": '{"content": null}'},
    ("special_tokens_map.json", "additional_special_tokens"): {"number": "5", "empty": '[""]', "numbers": "[5]"},
}
TOKENIZER_CASES = [
    pytest.param(file, name, text, id=f"{file}-{name[:30]}-{what}")
    for (file, name), values in SENTENCEPIECE.items()
    for what, text in values.items()
]


@pytest.mark.parametrize(("file", "name", "text"), TOKENIZER_CASES)
def test_token_declarations_with_a_wrong_value_are_refused(tiny_files, tmp_path, file, name, text):
    shutil.copy(tiny_files["llama"] / "tokenizer.model", tmp_path)
    replaced(tmp_path / file, name, text)
    with pytest.raises(CheckpointError) as raised:
        load_tokenizer(tmp_path)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 400
    assert file in message


def json_tokenizer(folder: Path) -> Path:
    library = Tokenizer(models.BPE({"a": 0, "b": 1, "<s>": 2, "</s>": 3}, []))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder


JSON_TOKENIZER = {
    "added_tokens/0/id": IDS,
    "added_tokens/0/content": {"number": "5", "empty": '""', "null": "null"},
    "added_tokens": {"huge": "1e400", "number": "5", "text": '"<x>"', "object": '{"id": 5}'},
    "model/vocab/a": IDS,
    "model": {"number": "5", "null": "null", "list": "[]"},
}


@pytest.mark.parametrize(("name", "text"), cases(JSON_TOKENIZER))
def test_tokenizer_json_with_a_wrong_value_is_refused(tmp_path, name, text):
    json_tokenizer(tmp_path)
    replaced(tmp_path / "tokenizer.json", name, text)
    with pytest.raises(CheckpointError) as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
    assert "tokenizer.json" in str(raised.value)


GENERATION = {f"{role}_token_id": {k: v for k, v in IDS.items() if k != "null"} for role in ("bos", "eos", "pad")}
GENERATION["bos_token_id"] = {name: text for name, text in GENERATION["bos_token_id"].items() if name != "list"}
GENERATION["eos_token_id"] = {k: v for k, v in GENERATION["eos_token_id"].items() if k != "list"} | {
    "list of text": '["2"]',
    "list of true": "[true]",
    "list of negatives": "[-5, 3]",
}
GENERATION["pad_token_id"] = {name: text for name, text in GENERATION["pad_token_id"].items() if name != "list"}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("name", "text"), cases(GENERATION))
def test_generation_config_ids_with_a_wrong_value_are_refused(tmp_path, file, name, text):
    json_tokenizer(tmp_path)
    replaced(tmp_path / file, name, text)
    with pytest.raises(CheckpointError) as raised:
        load_tokenizer(tmp_path)
    assert_one_line(raised.value, tmp_path / file, name)


def test_absent_ids_are_accepted(tmp_path):
    json_tokenizer(tmp_path)
    ids = {"pad_token_id": -1, "bos_token_id": None, "eos_token_id": [3, 0]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ids))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 3, 3)


MANIFEST = {
    "leaves/vit~1positions/shape": {
        "negative": "[-1, 64]",
        "text": '"x"',
        "huge": "[" + "9" * 400 + "]",
        "zero": "[0]",
    },
    "leaves/vit~1positions/dtype": {"unknown": '"evil"', "number": "5", "list": '["float32"]', "null": "null"},
    "leaves/vit~1positions": {"number": "5", "null": "null", "list": "[]"},
    "sources": {"number": "5", "list": "[1]", "inside": '{"vl": [{"name": 5}]}', "null": "null"},
    "format": {"text": '"1"', "huge": "9" * 400},
}


@pytest.mark.parametrize(("name", "text"), cases(MANIFEST))
def test_a_manifest_with_a_wrong_value_is_refused(tiny_model, tmp_path, name, text):
    for entry in tiny_model.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    fields = json.loads((tiny_model / "manifest.json").read_text())
    (tmp_path / "manifest.json").unlink()
    *parents, last = name.split("/")
    inner = fields
    for part in parents:
        inner = inner[part.replace("~1", "/")]
    inner[last.replace("~1", "/")] = "@value@"
    (tmp_path / "manifest.json").write_text(json.dumps(fields).replace('"@value@"', text))
    with pytest.raises(CheckpointError) as raised:
        open_model(tmp_path)
    assert_one_line(raised.value, tmp_path / "manifest.json", "manifest")
