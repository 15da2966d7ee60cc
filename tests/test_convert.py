"""Converted weights equal the files' values transposed by the rules.

They are compared with hand-written rules, and by bit-exact round trips.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN_HEADS
from conversions import Leaves, convert_files, drop_components, plan, read_leaves, read_torch_tensors, to_bytes
from safetensors.numpy import load_file

from vllama_jax import convert
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.config import tiny
from vllama_jax.convert import rules
from vllama_jax.convert.tiny import write_tiny

# One weight at a time, compared with a hand-written rule.


@pytest.fixture(scope="session")
def tiny_leaves(tiny_model: Path) -> Leaves:
    return read_leaves(tiny_model)


@pytest.fixture(scope="session")
def tiny_tensors(tiny_files: dict[str, Path]) -> dict[str, dict[str, np.ndarray]]:
    paths = drop_components(tiny_files, "config", "llama") | {"llama": tiny_files["llama"] / "model.safetensors"}
    return {kind: load_file(path) for kind, path in paths.items()}


def qkv_bias(t):
    query, value = t["blocks.1.attn.q_bias"], t["blocks.1.attn.v_bias"]
    return np.stack([query, np.zeros(64, np.float32), value]).reshape(3, 4, 16)


def patch_kernel(t):
    weight = t["patch_embed.proj.weight"]
    return np.array([weight[:, c, y, x] for y in range(14) for x in range(14) for c in range(3)])


def clip_kernel(t):
    weight = t["modality_preprocessors.vision.rgbt_stem.proj.1.weight"]
    frame = [[weight[:, c, f, y, x] for y in range(14) for x in range(14) for c in range(3)] for f in range(2)]
    return np.array(frame)


def key_heads(t):
    weight = t["model.layers.2.self_attn.k_proj.weight"]  # 2 key heads of 16 for 4 query heads
    return np.stack([weight[:16].T, weight[16:].T], axis=1)


def out_heads(t):
    weight = t["model.layers.0.self_attn.o_proj.weight"]
    return np.stack([weight[:, 16 * head : 16 * head + 16].T for head in range(4)])


def qkv_kernel(t):
    query, key, value = np.split(t["modality_trunks.vision.blocks.1.attn.in_proj_weight"], 3)
    return np.stack([part.T.reshape(64, 4, 16) for part in (query, key, value)], axis=1)


def bert(layer: int, name: str):
    return lambda t: t[f"Qformer.bert.encoder.layer.{layer}.{name}"]


BY_HAND = [
    ("eva_vit", "vit/blocks/attention/qkv/bias", 1, qkv_bias),
    ("eva_vit", "vit/patch_embed/kernel", None, patch_kernel),
    ("eva_vit", "vit/class_token", None, lambda t: t["cls_token"][0, 0]),
    ("eva_vit", "vit/positions", None, lambda t: t["pos_embed"][0]),
    ("eva_vit", "vit/blocks/mlp/up/kernel", 2, lambda t: t["blocks.2.mlp.fc1.weight"].T),
    ("imagebind", "imagebind/vision/patch_embed", None, clip_kernel),
    ("imagebind", "imagebind/vision/blocks/attention/qkv/kernel", 1, qkv_kernel),
    (
        "imagebind",
        "imagebind/audio/blocks/attention/extra_value",
        1,
        lambda t: t["modality_trunks.audio.blocks.1.attn.bias_v"].reshape(4, 12),
    ),
    (
        "imagebind",
        "imagebind/audio/patch_embed/kernel",
        None,
        lambda t: np.moveaxis(t["modality_preprocessors.audio.rgbt_stem.proj.weight"], (2, 3, 1, 0), (0, 1, 2, 3)),
    ),
    ("blip2", "ln_vision/scale", None, lambda t: t["ln_vision.weight"]),
    ("blip2", "image_qformer/cross_layers/mlp_norm/scale", 1, bert(2, "output_query.LayerNorm.weight")),
    ("blip2", "image_qformer/plain_layers/mlp_norm/scale", 1, bert(3, "output_query.LayerNorm.weight")),
    (
        "blip2",
        "image_qformer/cross_layers/cross_attention/norm/bias",
        1,
        bert(2, "crossattention.output.LayerNorm.bias"),
    ),
    ("vl", "video_qformer/queries", None, lambda t: t["video_query_tokens"][0]),
    ("vl", "frame_positions", None, lambda t: t["video_frame_position_embedding.weight"]),
    ("vl", "llama_proj/kernel", None, lambda t: t["llama_proj.weight"].T),
    ("al", "audio_llama_proj/bias", None, lambda t: t["audio_llama_proj.bias"]),
    ("llama", "llama/embedding", None, lambda t: t["model.embed_tokens.weight"]),
    ("llama", "llama/head/kernel", None, lambda t: t["lm_head.weight"].T),
    ("llama", "llama/blocks/attention/key/kernel", 2, key_heads),
    ("llama", "llama/blocks/attention/out/kernel", 0, out_heads),
    ("llama", "llama/blocks/mlp/gate/kernel", 1, lambda t: t["model.layers.1.mlp.gate_proj.weight"].T),
    ("llama", "llama/blocks/mlp_norm/scale", 1, lambda t: t["model.layers.1.post_attention_layernorm.weight"]),
]


@pytest.mark.parametrize(("kind", "path", "row", "expected"), BY_HAND, ids=[case[1] for case in BY_HAND])
def test_converted_weights_equal_hand_transposed_tensors(tiny_leaves, tiny_tensors, kind, path, row, expected):
    leaf = tiny_leaves[path] if row is None else tiny_leaves[path][row]
    np.testing.assert_array_equal(leaf, expected(tiny_tensors[kind]))


# All weights, converted back to PyTorch's layout.


def inverted(leaves: Leaves, table: list[rules.Rule]) -> dict[str, np.ndarray]:
    """Compute the tensors of the source file from restored weights."""
    tensors = {}
    for rule in table:
        leaf = leaves[rule.target]
        rows = [leaf] if rule.layers is None else leaf
        for names, row in zip(rule.names(), rows, strict=True):
            tensors |= dict(zip(names, rule.transform.to_torch(row), strict=True))
    return tensors


KINDS = ["eva_vit", "blip2", "imagebind", "minigpt4", "vl", "al", "llama"]


@pytest.mark.parametrize("kind", KINDS)
def test_rules_invert_exactly(kind):
    cfg = tiny()
    shapes = convert.abstract_shapes(cfg)
    for rule in convert.rule_tables(cfg, [kind])[kind]:
        row = shapes[rule.target] if rule.layers is None else shapes[rule.target][1:]
        inputs = [
            np.random.default_rng(number).standard_normal(shape, np.float32)
            for number, shape in enumerate(rule.source_shapes(shapes[rule.target]))
        ]
        ours = rule.transform.to_jax(*inputs)
        assert ours.shape == row, rule
        for back, tensor in zip(rule.transform.to_torch(ours), inputs, strict=True):
            np.testing.assert_array_equal(back, tensor, err_msg=str(rule))


@pytest.mark.parametrize("shape", [(1, 1), (16, 5), (33, 40), (15, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transpose_contiguous_is_in_c_order(shape, dtype):
    matrix = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    assert rules.transpose_contiguous(matrix).flags.c_contiguous
    np.testing.assert_array_equal(rules.transpose_contiguous(matrix), matrix.T)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("format", ["safetensors", "pth"])
@pytest.mark.parametrize("audio", [True, False])
def test_tiny_files_round_trip_bit_exactly(tmp_path, half, format, audio):
    paths = write_tiny(tmp_path / "files", config=tiny(audio=audio), half=half, format=format)
    planned = plan(paths)
    convert.convert(planned, tmp_path / "model")
    leaves = read_leaves(tmp_path / "model")
    for kind, table in convert.rule_tables(planned.config, list(planned.sources)).items():
        path = paths["llama"] / "model.safetensors" if kind == "llama" else paths[kind]
        if path.suffix == ".pth":
            held = {name: tensor.numpy() for name, tensor in read_torch_tensors(path).items()}
        else:
            held = load_file(path)
        for name, tensor in inverted(leaves, table).items():
            assert tensor.dtype == held[name].dtype, name
            assert to_bytes(tensor) == to_bytes(held[name]), name


def test_half_precision_dtypes_are_kept(tmp_path):
    leaves = convert_files(write_tiny(tmp_path / "files", half=True), tmp_path / "model")
    dtypes = {path.split("/")[0]: leaf.dtype.name for path, leaf in leaves.items()}
    assert (dtypes["vit"], dtypes["llama"], dtypes["video_qformer"]) == ("float16", "bfloat16", "float32")


# Golden: the original's own files.

# The original's module names → the file with the module's weights, and the prefix of the name that the file lacks.
GOLDEN_HOMES = {
    "visual_encoder.": ("eva_vit", "visual_encoder."),
    "audio_encoder.": ("imagebind", "audio_encoder."),
    "llama_model.": ("llama", "llama_model."),
    "ln_vision.": ("blip2", ""),
    "Qformer.": ("blip2", ""),
    "query_tokens": ("blip2", ""),
    "video_": ("vl", ""),
    "llama_proj.": ("vl", ""),
    "audio_": ("al", ""),
}
OTHER_TOWERS = re.compile(r"audio_encoder\.modality_\w+\.(text|depth|thermal|imu)\.")


def test_every_golden_tensor_that_the_original_uses_is_in_the_model_unchanged(golden, golden_files, golden_model):
    leaves, cfg = read_leaves(golden_model), open_model(golden_model).config
    held = {kind: read_torch_tensors(path) for kind, path in golden_files.items()}
    ours = {kind: inverted(leaves, table) for kind, table in convert.rule_tables(cfg, list(golden_files)).items()}
    assembled = json.loads((golden / "tiny_model_state_dict_shapes.json").read_text())
    for name, (*_, what) in assembled.items():
        if what == "buffer" or OTHER_TOWERS.match(name):
            continue
        kind, prefix = next(home for start, home in GOLDEN_HOMES.items() if name.startswith(start))
        tensor = held[kind][name.removeprefix(prefix)]
        found = ours[kind].pop(name.removeprefix(prefix))
        assert str(tensor.dtype) == f"torch.{found.dtype.name}", name
        assert to_bytes(found) == to_bytes(tensor.numpy()), name
    assert not any(ours.values())  # and the model has no other weights


def test_golden_llama_is_the_same_from_bin_and_from_safetensors(golden, golden_files, golden_model, tmp_path):
    paths = golden_files | {"llama": golden / "weights" / "llama-st"}
    bfloat16, float16 = convert_files(paths, tmp_path / "model", config=GOLDEN_HEADS), read_leaves(golden_model)
    for path in (path for path in float16 if path.startswith("llama/")):
        assert (bfloat16[path].dtype.name, float16[path].dtype.name) == ("bfloat16", "float16")
        np.testing.assert_array_equal(bfloat16[path].astype(np.float32), float16[path].astype(np.float32))


def test_golden_llama_with_a_pad_token_keeps_its_601_rows(golden, golden_files, tmp_path):
    paths = golden_files | {"llama": golden / "weights" / "llama-v0pad"}
    leaves = convert_files(paths, tmp_path / "model", config=GOLDEN_HEADS)
    tensors = read_torch_tensors(paths["llama"])
    assert leaves["llama/embedding"].shape == (601, 64)
    assert to_bytes(leaves["llama/embedding"]) == to_bytes(tensors["model.embed_tokens.weight"].numpy())
    assert to_bytes(leaves["llama/head/kernel"].T) == to_bytes(tensors["lm_head.weight"].numpy())


def test_golden_checkpoints_without_optimizer_state(golden, golden_files, tmp_path):
    style = golden / "weights" / "videollama2_style"
    files = {kind: style / f"{kind.upper()}_LLaMA_2_7B_Finetuned.pth" for kind in ("vl", "al")}
    leaves = convert_files(golden_files | files, tmp_path / "model", config=GOLDEN_HEADS, template="llama_2")
    for kind, path in files.items():
        tensors = read_torch_tensors(path)
        for name, tensor in inverted(
            leaves, convert.rule_tables(open_model(tmp_path / "model").config, [kind])[kind]
        ).items():
            assert to_bytes(tensor) == to_bytes(tensors[name].numpy()), name
    assert open_model(tmp_path / "model").config.template == "llama_2"


def test_audio_scale_is_read_from_the_file(golden_files, golden_model):
    stored = read_torch_tensors(golden_files["imagebind"])["modality_postprocessors.audio.1.log_logit_scale"]
    kept = open_model(golden_model).config.imagebind.audio.log_logit_scale
    assert to_bytes(np.float32(kept)) == to_bytes(stored.numpy())
