"""The published sizes, built without allocating weights: all names, shapes and counts equal the original's."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from vllama_jax.config import VideoLlamaConfig, video_llama_7b, video_llama_13b
from vllama_jax.convert import abstract_shapes, rule_tables

Shapes = dict[str, tuple[int, ...]]

KINDS = ("eva_vit", "blip2", "imagebind", "vl", "al", "llama")
PRESETS = {"7b": video_llama_7b, "13b": video_llama_13b}
presets = pytest.mark.parametrize("size", PRESETS)

# The original's parameters by component (prefixes of the names in its files).
COUNTS = {
    "eva_vit:": 985_894_528,
    "blip2:ln_vision.": 2_816,
    "blip2:Qformer.": 105_137_664,
    "blip2:query_tokens": 32 * 768,
    "vl:video_Qformer.": 18_905_088,
    "vl:video_query_tokens": 32 * 768,
    "vl:video_frame_position_embedding.": 32 * 768,
    "al:audio_Qformer.": 19_691_520,
    "al:audio_query_tokens": 8 * 768,
    "al:audio_position_embedding.": 8 * 1024,
    "imagebind:": 86_235_648 + 632_829_440,  # audio and vision; all six towers have 1,200,781,057
}
COUNTS_BY_SIZE = {
    "7b": {"llama:": 6_738_415_616, "vl:llama_proj.": 769 * 4096, "al:audio_llama_proj.": 769 * 4096},
    "13b": {"llama:": 13_015_864_320, "vl:llama_proj.": 769 * 5120, "al:audio_llama_proj.": 769 * 5120},
}


@pytest.fixture(scope="module")
def ours() -> Callable[[str], Shapes]:
    """The shapes of our weights by model size; each model is built once."""
    built = {size: abstract_shapes(preset()) for size, preset in PRESETS.items()}
    return built.__getitem__


def original_shapes(cfg: VideoLlamaConfig, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Map the shapes of our weights to the names and shapes of the original's files, as "kind:name"."""
    found: Shapes = {}
    for kind, rules in rule_tables(cfg, KINDS).items():
        for rule in rules:
            expected = rule.source_shapes(shapes[rule.target])
            for names in rule.names():
                for name, shape in zip(names, expected, strict=True):
                    assert f"{kind}:{name}" not in found, f"{name} is read twice"
                    found[f"{kind}:{name}"] = shape
    return found


def count(shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


@presets
def test_full_size_models_build_abstractly_within_seconds(size: str):
    start = time.process_time()
    abstract_shapes(PRESETS[size]())
    assert time.process_time() - start < 5


@presets
def test_every_parameter_has_one_rule(ours, size: str):
    targets = [rule.target for rules in rule_tables(PRESETS[size](), KINDS).values() for rule in rules]
    assert sorted(targets) == sorted(ours(size))


@presets
def test_parameter_counts_are_the_originals(ours, size: str):
    shapes = original_shapes(PRESETS[size](), ours(size))
    expected = COUNTS | COUNTS_BY_SIZE[size]
    assert {prefix: count(shapes, prefix) for prefix in expected} == expected
    assert count(shapes) == sum(expected.values())


@presets
def test_key_biases_that_the_original_lacks_are_zeros(ours, size: str):
    original = original_shapes(PRESETS[size](), ours(size))
    assert count(ours(size)) - count(original) == 39 * 1408


@presets
def test_shapes_equal_the_originals(ours, golden: Path, size: str):
    recorded = json.loads((golden / "full_param_shapes.json").read_text())
    assert original_shapes(PRESETS[size](), ours(size)) == recorded_shapes(recorded, size)


@presets
def test_recorded_counts_equal_the_constants(golden: Path, size: str):
    recorded = json.loads((golden / "full_param_shapes.json").read_text())["_num_params"]
    components = {
        "eva_vit:": "visual_encoder",
        "blip2:ln_vision.": "ln_vision",
        "blip2:Qformer.": "Qformer",
        "vl:video_Qformer.": "video_Qformer",
        "al:audio_Qformer.": "audio_Qformer",
        "llama:": f"llama_{size}",
    }
    expected = COUNTS | COUNTS_BY_SIZE[size]
    assert {prefix: expected[prefix] for prefix in components} == {
        prefix: recorded[component] for prefix, component in components.items()
    }
    heads = ("vl:video_frame_position_embedding.", "al:audio_position_embedding.")
    heads += ("vl:llama_proj.", "al:audio_llama_proj.")
    assert sum(expected[prefix] for prefix in heads) == recorded[f"heads_{size}"]


def recorded_shapes(recorded: Mapping[str, dict[str, list] | list], size: str) -> Shapes:
    """Return the original's parameters without its buffers, as "kind:name"."""
    modules = {
        "eva_vit:": "visual_encoder",
        "blip2:ln_vision.": "ln_vision",
        "blip2:Qformer.": "Qformer",
        "vl:video_Qformer.": "video_Qformer",
        "al:audio_Qformer.": "audio_Qformer",
        "imagebind:": "imagebind_huge",
        "llama:": f"llama_{size}",
    }
    found = {
        prefix + name: shape for prefix, component in modules.items() for name, shape in recorded[component].items()
    }
    for name, shape in recorded[f"heads_{size}"].items():
        found[("al:" if name.startswith("audio") else "vl:") + name] = shape
    for kind, name in (("blip2", "query_tokens"), ("vl", "video_query_tokens"), ("al", "audio_query_tokens")):
        found[f"{kind}:{name}"] = recorded[name]
    return {name: tuple(shape) for name, shape in found.items() if "buffer" not in shape and not other_tower(name)}


def other_tower(name: str) -> bool:
    """Whether a tensor belongs to one of ImageBind's four towers that Video-LLaMA does not use."""
    return name.startswith("imagebind:") and name.split(".")[1] not in ("audio", "vision")
