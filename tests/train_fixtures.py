"""Small runs for tests: a config, a reporter, and records of videos and images."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from vllama_jax import sharding
from vllama_jax.data.build import build
from vllama_jax.media.write import write_video
from vllama_jax.train import setup
from vllama_jax.train.config import CheckpointConfig, OptimConfig, TrainConfig
from vllama_jax.train.config_files import load_config

STEPS = 20
ONE = dataclasses.replace(load_config("vision_stage1")[0].mesh, data=8)
EACH = CheckpointConfig(save_interval_steps=1)


def use_one_device(patch: pytest.MonkeyPatch) -> None:
    """Train on one of the available devices: a step for several devices takes longer to compile."""
    patch.setattr(setup, "make_run_mesh", lambda *_: (sharding.make_mesh(devices=jax.devices()[:1]), ""))


def worker_processes(parent: int) -> set[int]:
    """Return the ids of the processes that data/workers.py has started for a process."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended
            starter = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if starter == parent and "workers.run_worker()" in (folder / "cmdline").read_text():
                found.add(int(folder.name))
    return found


class RecordingReporter:
    """A reporter that records its calls."""

    def __init__(self):
        self.messages: list[str] = []
        self.steps: list[dict] = []

    def show_message(self, text):
        self.messages.append(text)

    def show_plan(self, plan):
        self.plan = plan

    def begin(self, step):
        self.begun = step

    def step(self, metrics):
        self.steps.append(metrics)


def write_files(folder: Path, media: Path | None = None, videos: int = 4) -> Path:
    """Write videos and two images with conversations, and list the clips of a folder with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number in range(videos):
        write_video(folder / f"{number}.mp4", rng.integers(0, 256, (10, 64, 64, 3)).astype(np.uint8), fps=5)
        turns = [("What is number?", f"It is number {number}."), ("Sure?", "Yes, I am.")]
        messages = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        lines.append({"video": f"{number}.mp4", "conversations": messages})
    for number in range(2):
        Image.fromarray(rng.integers(0, 256, (50, 60, 3)).astype(np.uint8)).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": "<image>\nWhat?", "answer": f"Picture {number} of noise."})
    for file in sorted(media.glob("*.*")) if media else ():
        kind = "video" if file.suffix == ".mp4" else "image"
        lines.append({kind: str(file), "question": "What is it?", "answer": f"It is {file.stem}."})
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_records(files: Path) -> Path:
    """Build records of the files of `write_files`."""
    out = files.parent / "records"
    build("jsonl", files, out, allow_outside=True)  # the clips of `media` stay where they are
    return out


def config_of(base, records, name="vision_stage1", **options) -> TrainConfig:
    """Return a built-in run config at tiny size."""
    config, _ = load_config(name)
    one = dataclasses.replace(config.datasets[-1], path=str(records))
    return dataclasses.replace(
        config,
        **{
            "model": str(base),
            "datasets": (one,),
            "steps": STEPS,
            "batch_size": 2,
            "mesh": dataclasses.replace(config.mesh, data=1, fsdp=1),
            "optim": OptimConfig(lr=1e-3, min_lr=1e-4, warmup_lr=1e-4, warmup_steps=5),
            "checkpoint": CheckpointConfig(save_interval_steps=5),
            **options,
        },
    )


def write_config(path: Path, config: TrainConfig) -> Path:
    """Write the config as a Python file, as users do."""
    lines = ["from vllama_jax.config import *", "from vllama_jax.train.config import *", f"config = {config!r}"]
    path.write_text("\n".join(lines) + "\n")
    return path


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def short_config(base: Path, records: Path, **options) -> TrainConfig:
    """Return a config of eight steps on 8 devices, without activation checkpointing, which takes longer to compile."""
    short = {
        "steps": 8,
        "batch_size": 8,
        "mesh": ONE,
        "checkpoint": CheckpointConfig(save_interval_steps=4),
        "remat_policy": "none",
    }
    return config_of(base, records, **{**short, **options})
