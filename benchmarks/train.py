"""Measure a training step at medium size, live and from cached features, relative to PyTorch and to its floor.

    python benchmarks/train.py [--json]

Stage 1 of the vision branch on clips that are rendered here: components of width 384 to 1024 with random weights,
float32, two examples of eight 224² frames and 128 tokens. PyTorch (transformers' BLIP-2 vision model, Q-Former and
LLaMA) reads the same batches, freezes the same components and stores activations too. Both alternate step by step;
figures are medians. The floor is the FLOPs of the step (memory/flops.py) divided by the rate of one large matrix
product.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from timing import measure_product_rate

from vllama_jax import config as models
from vllama_jax import convert
from vllama_jax.convert.tiny import write_tiny
from vllama_jax.data.build import build
from vllama_jax.data.config import DataConfig, DatasetConfig
from vllama_jax.data.pipeline import HostBatch, prefetch_batches
from vllama_jax.media.write import write_video
from vllama_jax.memory.flops import step_flops
from vllama_jax.sharding import use_mesh
from vllama_jax.train import setup
from vllama_jax.train.config import OptimConfig, TrainConfig
from vllama_jax.train.loop import make_train_step
from vllama_jax.train.precompute import precompute_features

BATCH, CLIPS, LENGTH = 2, 16, 128
QFORMER = models.QFormerConfig(width=384, depth=6, num_heads=6, mlp_dim=1536, num_queries=32, cross_attention_every=2)
MODEL = models.VideoLlamaConfig(
    vit=models.VitConfig(width=768, depth=8, num_heads=12, mlp_dim=3072),
    image_qformer=QFORMER,
    video_qformer=dataclasses.replace(QFORMER, depth=2, cross_attention_every=1),
    audio_qformer=None,
    imagebind=None,
    llama=dataclasses.replace(
        models.LLAMA_7B, width=1024, depth=8, num_heads=16, num_kv_heads=16, mlp_dim=2752, vocab_size=32000
    ),
)

Step = Callable[[HostBatch], None]


def make_inputs(folder: Path) -> TrainConfig:
    """Write a model with random weights and records of moving noise with the longest captions; return a config."""
    files = write_tiny(folder / "weights", config=MODEL)
    overrides = json.loads(files.pop("config").read_text())
    components = {name: files[name] for name in ("eva_vit", "blip2")}
    convert.convert(convert.plan(llama_directory=files["llama"], files=components, config=overrides), folder / "model")
    clips, rng, lines = folder / "clips", np.random.default_rng(0), []
    clips.mkdir()
    for number in range(CLIPS):
        image = rng.integers(0, 256, (320, 426, 3)).astype(np.uint8)
        write_video(clips / f"{number}.mp4", [np.roll(image, 8 * frame, axis=1) for frame in range(48)], fps=12)
        lines.append(json.dumps({"video": f"{number}.mp4", "caption": " ".join(["noise moves"] * 40)}))
    (clips / "all.jsonl").write_text("\n".join(lines))
    build("jsonl", clips, folder / "records")
    text = dataclasses.replace(DatasetConfig(path="").text, max_length=LENGTH - QFORMER.num_queries - 8)
    return TrainConfig(
        model=str(folder / "model"),
        datasets=(DatasetConfig(path=str(folder / "records"), text=text),),
        steps=10_000,
        batch_size=BATCH,
        dropout=0.0,
        remat_policy="none",
        optim=OptimConfig(lr=1e-4),
        data=DataConfig(length_buckets=(LENGTH,), variants=1, num_threads=4),
    )


def make_our_step(config: TrainConfig) -> tuple[Step, setup.RunPlan]:
    """Make a function that runs a training step of this package, and the plan of the run."""
    plan = setup.plan_run(config)
    with use_mesh(plan.mesh):
        state, frozen, step = setup.init_train_state(plan), setup.load_frozen(plan), make_train_step(plan)

    def run(batch: HostBatch) -> None:
        nonlocal state
        with use_mesh(plan.mesh):
            state, metrics = step(state, frozen, setup.shard_batch(batch.arrays, plan))
        metrics["loss"].block_until_ready()

    return run, plan


def make_torch_step() -> Step:
    """Make a function that runs the same step in PyTorch, on a batch of frames or of features."""
    import torch
    from transformers import (
        Blip2QFormerConfig,
        Blip2QFormerModel,
        Blip2VisionConfig,
        Blip2VisionModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    def qformer(cfg: models.QFormerConfig, memory_width: int) -> torch.nn.Module:
        return Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=cfg.width,
                num_hidden_layers=cfg.depth,
                num_attention_heads=cfg.num_heads,
                intermediate_size=cfg.mlp_dim,
                cross_attention_frequency=cfg.cross_attention_every,
                encoder_hidden_size=memory_width,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    vit, llama = MODEL.vit, MODEL.llama
    vision = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=vit.width,
            num_hidden_layers=vit.depth,
            num_attention_heads=vit.num_heads,
            intermediate_size=vit.mlp_dim,
            image_size=vit.image_size,
            patch_size=vit.patch_size,
        )
    )
    language = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=llama.width,
            num_hidden_layers=llama.depth,
            num_attention_heads=llama.num_heads,
            intermediate_size=llama.mlp_dim,
            vocab_size=llama.vocab_size,
        )
    )
    image_qformer = qformer(MODEL.image_qformer, vit.width)
    for frozen in (vision, image_qformer, language):
        frozen.eval().requires_grad_(False)
    width, count = MODEL.video_qformer.width, MODEL.video_qformer.num_queries
    trainable = torch.nn.ModuleDict(
        {
            "qformer": qformer(MODEL.video_qformer, MODEL.image_qformer.width),
            "positions": torch.nn.Embedding(MODEL.num_frames, MODEL.image_qformer.width),
            "projection": torch.nn.Linear(width, llama.width),
        }
    )
    image_queries = torch.randn(1, MODEL.image_qformer.num_queries, MODEL.image_qformer.width)
    queries = torch.nn.Parameter(torch.randn(1, count, width))
    optimizer = torch.optim.AdamW([*trainable.parameters(), queries], lr=1e-4, weight_decay=0.05)

    def encode(frames: torch.Tensor) -> torch.Tensor:
        pixels = (frames.flatten(0, 1).permute(0, 3, 1, 2) / 255 - 0.45) / 0.27
        features = vision(pixels).last_hidden_state
        read = image_qformer(query_embeds=image_queries.expand(len(features), -1, -1), encoder_hidden_states=features)
        return read.last_hidden_state.unflatten(0, frames.shape[:2])

    def run(batch: HostBatch) -> None:
        arrays = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
        with torch.no_grad():
            features = arrays["features"] if "features" in arrays else encode(arrays["frames"])
            words = language.get_input_embeddings()(arrays["ids"])
        memory = (features + trainable["positions"].weight[:, None]).flatten(1, 2)
        read = trainable["qformer"](query_embeds=queries.expand(len(memory), -1, -1), encoder_hidden_states=memory)
        tokens = trainable["projection"](read.last_hidden_state)
        inputs = words.masked_scatter(arrays["is_media"][..., None], tokens)
        mask = torch.arange(words.shape[1]) < arrays["length"][:, None]
        labels = torch.full(mask.shape, -100)
        rows, positions = torch.nonzero(arrays["targets"] >= 0, as_tuple=True)
        labels[rows, arrays["positions"][rows, positions].long()] = arrays["targets"][rows, positions].long()
        logits = language(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def time_step(run: Step, batch: HostBatch) -> float:
    """Return the seconds of a step."""
    start = time.perf_counter()
    run(batch)
    return time.perf_counter() - start


def measure(folder: Path) -> dict[str, float]:
    """Measure precomputation and both steps, live and from cached features."""
    live = make_inputs(folder)
    start = time.perf_counter()
    precompute_features(live, folder / "features")
    cache_seconds = time.perf_counter() - start
    cached = dataclasses.replace(live, data=dataclasses.replace(live.data, feature_cache=str(folder / "features")))
    torch_run, results = make_torch_step(), {}
    for name, config, rounds in (("live", live, 5), ("cached", cached, 9)):
        our_run, plan = make_our_step(config)
        stream = prefetch_batches(plan.reader, 0, config.steps, config.data)
        batch = next(stream)
        our_run(batch), torch_run(batch)
        times = []
        for batch in itertools.islice(stream, rounds):
            times.append((time_step(our_run, batch), time_step(torch_run, batch), measure_product_rate()))
        ours, theirs, rate = (statistics.median(column) for column in zip(*times, strict=True))
        floor = step_flops(plan.base.config, config.branch, batch.arrays, config.remat_policy) / rate
        results |= {
            f"{name}_examples_per_second": BATCH / ours,
            f"{name}_torch_examples_per_second": BATCH / theirs,
            f"{name}_torch_time_over_ours": theirs / ours,
            f"{name}_over_floor": ours / floor,
        }
    return results | {"product_gflops": rate / 1e9, "records_cached_per_second": CLIPS / cache_seconds}


def main() -> None:
    """Measure and print all figures."""
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder))
    if "--json" in sys.argv:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:40} {value:.3f}")
    print(f"{jax.device_count()} device(s), {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
