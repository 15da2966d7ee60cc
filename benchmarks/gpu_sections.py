"""The sections of benchmarks/gpu.py, which runs each in a process of its own.

    python benchmarks/gpu_sections.py SECTION SIZE SECONDS FILE

A section consists of cases. The figures of each are appended to FILE, an object per line, as soon as they are measured.
On a machine without a GPU, everything runs, and figures of a GPU are null.
"""

import dataclasses
import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from gpu import NO_TIME
from language import measure_token_seconds
from random_weights import draw_weights
from timing import measure_best_seconds

from vllama_jax import config
from vllama_jax.errors import format_error
from vllama_jax.io.jsonl import JsonLinesFile
from vllama_jax.memory.abstract_run import AbstractRun, abstract_run, lower_step, num_media_tokens
from vllama_jax.memory.chips import find_chip
from vllama_jax.memory.estimate import estimate_training, find_device
from vllama_jax.memory.flops import encoder_flops, peak_flops, step_flops
from vllama_jax.nn.attention import attend_with_einsum, self_attend
from vllama_jax.nn.network import abstract_network
from vllama_jax.nn.video_llama import VideoLlama, find_owner, keep_components
from vllama_jax.sharding import make_mesh
from vllama_jax.train.config import MeshConfig, TrainConfig
from vllama_jax.train.config_files import load_config
from vllama_jax.train.optim import make_optimizer
from vllama_jax.train.state import init_state

Figures = dict[str, float | str | None]
Case = tuple[str, Callable[[], Figures]]
Arrays = TypeVar("Arrays")

# Bounds of the relative error, |a − b| / |b| over all outputs.
# float32: TensorFloat-32, which has 10 bits of mantissa, would exceed it.
# bfloat16: 2.5 times the largest error of a component on a CPU (0.016: the ViT with all 39 layers).
BOUNDS = {"float32": 1e-4, "bfloat16": 0.04}
ATTENTION_BOUND = 0.01  # of attention in bfloat16; 0.003 with the einsum on a CPU

PROMPT, NEW = 60, 33  # tokens before the first and the mean one of the 32 decoded tokens that are timed
CASE_SECONDS = 60  # no case starts with less time left: the longest compile 32 unstacked layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes that are measured.

    Attributes:
        model: The model; all sections use its widths, and its depths except where a case says so.
        parity_layers: Layers of the language model that are compared with a CPU.
        images: Images of an attention call, and rows of a training step.
        encoded: Numbers of videos and audio files that are encoded at once.
        prompts: Numbers of prompts that are decoded at once.
    """

    model: config.VideoLlamaConfig
    parity_layers: int
    images: int
    encoded: tuple[int, ...]
    prompts: tuple[int, ...]


SIZES = {
    # 32 images are a chunk of the ViT's blocks, and 32 rows are those of a GPU in the paper.
    "full": Size(model=config.video_llama_7b(), parity_layers=4, images=32, encoded=(1, 8), prompts=(1, 8, 32)),
    "tiny": Size(model=config.tiny(), parity_layers=2, images=2, encoded=(1,), prompts=(2,)),
}


def on_gpu() -> bool:
    """Return whether JAX has a GPU here."""
    return jax.default_backend() == "gpu"


def if_gpu(value: float | None) -> float | None:
    """Return a figure of the GPU; None, "not measured", on other devices and where JAX does not report it."""
    return value if on_gpu() else None


def measure_seconds(run: Callable[[], object], calls: int) -> float:
    """Return the time of a call on the GPU, started `calls` times in a row; elsewhere, only run it."""
    return measure_best_seconds(run, *((3, calls) if on_gpu() else (1, 1)))


def describe_device(size: Size) -> Iterator[Case]:
    """Return the names and versions of what is measured."""

    def measure() -> Figures:
        if size is SIZES["full"] and not on_gpu():
            raise RuntimeError(f"no GPU: JAX found {jax.devices()[0].device_kind}; try the script with --size tiny")
        device = jax.devices()[0]
        chip = find_chip(device)
        return {
            "device": device.device_kind,
            "platform": device.client.platform_version.split("\n")[0],
            "jax": jax.__version__,
            "gigabytes_for_jax": if_gpu((device.memory_stats() or {}).get("bytes_limit", 0) / 1e9),
            "peak_teraflops": if_gpu(chip and chip.flops / 1e12),
            "peak_gigabytes_per_second": if_gpu(chip and chip.hbm_bandwidth / 1e9),
        }

    yield "device", measure


def compare_towers(size: Size) -> Iterator[Case]:
    """Compare each component on the GPU, in float32 and bfloat16, with the same function in float32 on the CPU."""
    llama = dataclasses.replace(size.model.llama, depth=size.parity_layers)
    model = dataclasses.replace(size.model, llama=llama)
    bind, image = model.require_imagebind(), (2, model.vit.image_size, model.vit.image_size, 3)
    inputs = {
        "vit": image,
        "llama": (2, 72, llama.width),
        "imagebind/vision": image,
        "imagebind/audio": (2, bind.audio.num_mel_bins, bind.audio.num_mel_frames),
        "image_qformer": (2, model.vit.num_tokens, model.vit.width),
        "video_qformer": (2, model.num_frames * model.image_qformer.num_queries, model.image_qformer.width),
        "audio_qformer": (2, model.num_clips, bind.embed_dim),
    }
    depths = {"llama": f" ({llama.depth} of {size.model.llama.depth} layers)"}
    for path, shape in inputs.items():
        yield path + depths.get(path, ""), functools.partial(compare_tower, model, path, shape)


def compare_tower(model: config.VideoLlamaConfig, path: str, shape: tuple[int, ...]) -> Figures:
    """Compare one component, with weights that bfloat16 represents exactly."""
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    # The language model has a mask: the second sequence is padded.
    arguments = (x, np.arange(shape[1]) < np.array([[shape[1]], [shape[1] // 2]])) if path == "llama" else (x,)
    weights = draw_weights(getattr(*find_owner(abstract_network(model, "bfloat16"), path)))
    run = jax.jit(lambda module, *arguments: module(*arguments))
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    outputs = {"bfloat16": run(weights, *arguments)}
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
    with jax.default_matmul_precision("highest"):  # GPUs would use TensorFloat-32
        outputs["float32"], expected = (run(*jax.device_put((weights, *arguments), place)) for place in (device, cpu))
    figures: Figures = {}
    for dtype, bound in BOUNDS.items():
        figures |= {f"{dtype}_error": relative_error(outputs[dtype], expected), f"{dtype}_bound": bound}
    return figures


def relative_error(computed: Any, expected: Any) -> float:
    """Return |computed − expected| / |expected|. Raise ArithmeticError if it is not finite."""
    computed, expected = (np.asarray(array, np.float64) for array in (computed, expected))
    error = np.linalg.norm(computed - expected) / np.linalg.norm(expected)
    if not np.isfinite(error):
        raise ArithmeticError("the output has values that are not finite")
    return float(error)


def compare_attention(size: Size) -> Iterator[Case]:
    """Compare the attention of each frozen tower, which is cuDNN's on a GPU, with the einsum: error and time."""
    bind = size.model.require_imagebind()
    towers = {"vit": size.model.vit, "imagebind/vision": bind.vision, "imagebind/audio": bind.audio}
    for name, tower in towers.items():
        shape = (size.images, tower.num_tokens, 3, tower.num_heads, tower.width // tower.num_heads)
        case = f"{name}, head dimension {shape[-1]}"
        yield case, functools.partial(compare_attention_of, shape, extra=name == "imagebind/audio")


def compare_attention_of(shape: tuple[int, ...], *, extra: bool) -> Figures:
    """Compare `self_attend` for queries, keys and values of a shape [b, n, 3, h, k] in bfloat16."""
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)
    key_value = jnp.asarray(rng.standard_normal((2, *shape[-2:]), np.float32), jnp.bfloat16) if extra else None
    attend, einsum = jax.jit(self_attend), jax.jit(attend_with_einsum)
    cudnn = "cudnn" in attend.lower(qkv, key_value).as_text()
    if on_gpu() and not cudnn:
        raise RuntimeError("self_attend is lowered to the einsum on this GPU, not to cuDNN")
    with jax.default_matmul_precision("highest"):
        expected = einsum(*jax.tree.map(lambda x: x.astype(jnp.float32), (qkv, key_value)))
    seconds, einsum_seconds = (
        measure_seconds(functools.partial(run, qkv, key_value), calls=20) for run in (attend, einsum)
    )
    return {
        "implementation": "cuDNN" if cudnn else "einsum",
        "error": relative_error(attend(qkv, key_value), expected),
        "bound": ATTENTION_BOUND,
        "error_of_einsum": relative_error(einsum(qkv, key_value), expected),
        "ms": if_gpu(1e3 * seconds),
        "einsum_ms": if_gpu(1e3 * einsum_seconds),
        "einsum_time_ratio": if_gpu(einsum_seconds / seconds),
    }


def measure_train_step(size: Size) -> Iterator[Case]:
    """Measure the step of stage 1, at the length of a caption: 32 media tokens and 40 of text."""
    run = dataclasses.replace(
        load_config("vision_stage1")[0], batch_size=size.images, compute_dtype="bfloat16", mesh=MeshConfig(data=1)
    )
    model = dataclasses.replace(size.model, audio_qformer=None, imagebind=None)
    length = num_media_tokens(model, run) + 40
    yield f"{run.batch_size} rows of {length} tokens", functools.partial(time_train_step, model, run, length)


def time_train_step(model: config.VideoLlamaConfig, run: TrainConfig, length: int) -> Figures:
    """Compile a step, run it on random weights and data, and compare its peak memory with the estimate."""
    device = jax.devices()[0]
    mesh = make_mesh(devices=[device])
    abstract = abstract_run(model, run, mesh, length)
    start = time.perf_counter()
    step = lower_step(abstract, mesh).compile()
    compile_seconds = time.perf_counter() - start
    state, frozen, batch = make_step_inputs(model, abstract)
    start_peak = get_peak_gigabytes(device)

    def run_step() -> Any:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return metrics["loss"]

    seconds = measure_seconds(run_step, calls=3)
    loss = float(run_step())
    if not np.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss}")
    flops, peak = step_flops(model, run.branch, abstract.batch, run.remat_policy), peak_flops(device)
    memory = step.memory_analysis()
    sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    estimated = estimate_training(model, "", run, run.mesh, find_device("here"), length).device_total
    return {
        "loss": loss,
        "seconds": if_gpu(seconds),
        "samples_per_second": if_gpu(run.batch_size / seconds),
        "mfu": if_gpu(peak and flops / seconds / peak),
        "peak_gigabytes": get_peak_gigabytes(device),
        "peak_before_first_step": start_peak,
        "compiled_gigabytes": if_gpu((sum(sizes) - memory.alias_size_in_bytes) / 1e9),
        "estimated_gigabytes": if_gpu(estimated / 1e9),
        "compile_seconds": if_gpu(compile_seconds),
    }


def make_step_inputs(model: config.VideoLlamaConfig, run: AbstractRun) -> tuple[Any, Any, Any]:
    """Make the state, the frozen weights and the batch of a run on random data, placed as the step takes them."""
    rng = np.random.default_rng(0)
    media, length = num_media_tokens(model, run.config), run.batch["ids"].shape[1]
    positions = np.arange(length)
    labels = run.batch["positions"].shape
    batch = {
        "frames": rng.integers(0, 256, run.batch["frames"].shape).astype(np.uint8),
        "ids": rng.integers(0, model.llama.vocab_size, run.batch["ids"].shape),
        "is_media": np.broadcast_to((positions >= 1) & (positions <= media), run.batch["ids"].shape),
        "length": np.full(run.batch["length"].shape, length),
        "positions": np.broadcast_to(np.arange(length - labels[1], length), labels),
        "targets": rng.integers(0, model.llama.vocab_size, labels),
    }
    batch = {name: array.astype(run.batch[name].dtype) for name, array in batch.items()}
    state = init_state(draw_weights(run.state.weights), make_optimizer(run.config.optim, run.config.steps))
    inputs = (state, draw_weights(run.frozen), batch)
    return jax.device_put(inputs, jax.tree.map(lambda leaf: leaf.sharding, (run.state, run.frozen, run.batch)))


def get_peak_gigabytes(device: jax.Device) -> float | None:
    """Return the largest memory that this process had on the GPU; None where JAX does not report it."""
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return if_gpu(peak and peak / 1e9)


def measure_encoding(size: Size) -> Iterator[Case]:
    """Measure the vision branch on videos and the audio branch on audio files, from arrays to media tokens."""

    @functools.cache
    def make_network() -> VideoLlama:
        network = abstract_network(size.model, "bfloat16")
        components = {path for branch in network.branches for path in branch.components}
        keep_components(network, components)
        return draw_weights(network)

    def measure(branch: str, array: str, x: np.ndarray) -> Figures:
        encode = jax.jit(VideoLlama.encode_video if branch == "vision" else VideoLlama.encode_audio)
        network, x = make_network(), jnp.asarray(x)
        seconds = measure_seconds(lambda: encode(network, x), calls=5)
        flops, peak = len(x) * encoder_flops(size.model, branch, {array: x}), peak_flops(jax.devices()[0])
        return {
            "ms": if_gpu(1e3 * seconds),
            "per_second": if_gpu(x.shape[0] * x.shape[1] / seconds),
            "mfu_of_encoders": if_gpu(peak and flops / seconds / peak),
        }

    audio, side = size.model.require_imagebind().audio, size.model.vit.image_size
    for count in size.encoded:
        frames = np.ones((count, size.model.num_frames, side, side, 3), np.float32)
        mel = np.ones((count, size.model.num_clips, audio.num_mel_bins, audio.num_mel_frames), np.float32)
        yield f"{count} × {frames.shape[1]} frames", functools.partial(measure, "vision", "frames", frames)
        yield f"{count} × {mel.shape[1]} audio clips", functools.partial(measure, "audio", "mel", mel)


def measure_decoding(size: Size) -> Iterator[Case]:
    """Measure a decoded token, relative to the time to read the language model and the KV cache from memory."""

    @functools.cache
    def make_llama() -> Any:
        llama = draw_weights(abstract_network(size.model, "bfloat16").llama)
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(llama)) - llama.embedding.nbytes
        llama.unstack(jax.default_backend())
        return llama, weights

    def measure(count: int) -> Figures:
        llama, weights = make_llama()
        seconds = min(measure_token_seconds(llama, PROMPT, count) for _ in range(3 if on_gpu() else 1))
        cfg, chip = llama.cfg, find_chip(jax.devices()[0])
        cache = 2 * cfg.depth * cfg.num_kv_heads * cfg.head_dim * 2 * (PROMPT + NEW) * count
        floor = (weights + cache) / chip.hbm_bandwidth if chip and chip.hbm_bandwidth else None
        return {
            "ms_per_token": if_gpu(1e3 * seconds),
            "tokens_per_second": if_gpu(count / seconds),
            "floor_ms": if_gpu(floor and 1e3 * floor),
            "over_floor": if_gpu(floor and seconds / floor),
        }

    for count in size.prompts:
        yield f"batch {count}", functools.partial(measure, count)


# In the order in which benchmarks/gpu.py runs them.
SECTIONS: dict[str, Callable[[Size], Iterator[Case]]] = {
    "device": describe_device,
    "parity": compare_towers,
    "attention": compare_attention,
    "train_step": measure_train_step,
    "encode": measure_encoding,
    "decode": measure_decoding,
}


def main(section: str, size: str, seconds: str, file: str) -> None:
    """Run the cases of a section, as long as there is time. An error in one is recorded, and the others run."""
    end, records = time.monotonic() + float(seconds), JsonLinesFile(Path(file))
    for case, measure in SECTIONS[section](SIZES[size]):
        record: dict[str, Any] = {"section": section, "case": case}
        if time.monotonic() > end - CASE_SECONDS:
            records.add(record | {"skipped": NO_TIME})
            continue
        try:
            record["figures"] = measure()
        except Exception as error:  # any error of JAX or of a library is a result here
            record |= {"failed": format_error(error), "traceback": traceback.format_exc()}
        records.add(record)


if __name__ == "__main__":
    main(*sys.argv[1:])
