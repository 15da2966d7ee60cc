"""Configs: JSON round trips, validation, and the cost of imports."""

import dataclasses
import json
import subprocess
import sys

import pytest

import vllama_jax as vl
from vllama_jax import config
from vllama_jax.config import ConfigError, VideoLlamaConfig, from_json, merge, to_json

PRESETS = {
    "7b": config.video_llama_7b(),
    "13b llama_2": config.video_llama_13b("llama_2"),
    "tiny": config.tiny(),
    "picture-only": config.tiny(audio=False),
    "llama 3 rope": dataclasses.replace(
        config.tiny(),
        llama=dataclasses.replace(config.tiny().llama, rope_scaling=config.RopeScaling(kind="llama3", factor=8.0)),
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_comes_back_from_json_unchanged(name):
    assert from_json(to_json(PRESETS[name])) == PRESETS[name]


def test_presets_are_the_published_models():
    seven, thirteen = config.video_llama_7b(), config.video_llama_13b("llama_2")
    assert (seven.llama.width, seven.llama.depth, seven.template, seven.llama.max_length) == (4096, 32, "vicuna", 2048)
    assert (thirteen.llama.width, thirteen.llama.depth, thirteen.llama.num_heads) == (5120, 40, 40)
    assert (thirteen.template, thirteen.llama.max_length, thirteen.llama.norm_eps) == ("llama_2", 4096, 1e-5)
    assert (seven.vit.depth, seven.image_qformer.cross_attention_every) == (39, 2)


def changed(**changes) -> str:
    return json.dumps(merge(json.loads(to_json(config.tiny())), changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config: not JSON"),
        ("[]", r"config: must contain a JSON object, not list"),
        (changed(vit={"wdith": 3}), r"config\.vit: unknown field wdith; known fields: depth, .*width"),
        (changed(llama={"width": "64"}), r"config\.llama\.width: '64' is not of type int"),
        (changed(llama={"norm_eps": True}), r"config\.llama\.norm_eps: True is not of type float"),
        (changed(vit={"depth": 3.0}), r"config\.vit\.depth: 3\.0 is not of type int"),
        (changed(llama={"rope_scaling": {"kind": "yarn", "factor": 2}}), r"rope_scaling\.kind: 'yarn' is not of type"),
        (changed(vit={"num_heads": 0}), r"config\.vit\.num_heads: must be at least 1, not 0"),
        (changed(vit={"num_heads": 5}), r"vit: width 64 is not a multiple of num_heads 5"),
        (changed(llama={"num_kv_heads": 3}), r"llama: num_heads 4 is not a multiple of num_kv_heads 3"),
        (changed(imagebind=None), r"audio_qformer and imagebind require each other"),
        (changed(image_qformer={"depth": 3}), r"image_qformer: cross_attention_every must be 1 or 2 and divide"),
        (json.dumps({"vit": {}}), r"config: missing image_qformer, llama, video_qformer"),
    ],
)
def test_invalid_configs_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        from_json(text)


def test_an_override_replaces_field_by_field():
    fields = merge(dataclasses.asdict(config.tiny()), {"vit": {"depth": 5}, "template": "plain"})
    merged = config.from_dict(fields, VideoLlamaConfig)
    assert merged == dataclasses.replace(
        config.tiny(), vit=dataclasses.replace(config.tiny().vit, depth=5), template="plain"
    )


@pytest.mark.parametrize("module", ["vllama_jax", "vllama_jax.config", "vllama_jax.text.prompts", "vllama_jax.media"])
def test_importing_config_imports_nothing_heavy(module):
    code = f"import sys, {module}; print(sorted({{'jax', 'flax', 'torch', 'librosa', 'orbax'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve():
    assert all(getattr(vl, name) is not None for name in vl.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        vl.nothing  # noqa: B018


def test_all_errors_derive_from_vllama_error():
    for error in (vl.MediaError, vl.CheckpointError, vl.ConfigError, vl.DataError):
        assert issubclass(error, vl.VllamaError)
