"""A complete run in under a minute that needs no input files.

    vllama train smoke --out RUN

It renders clips, creates a tiny model of random weights, and trains it. The trained model's answers are meaningless,
but all steps from data to checkpoint are those of a real run.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vllama_jax.train.config import CheckpointConfig, DatasetConfig, OptimConfig, TrainConfig

config = TrainConfig(
    model="inputs/model",
    datasets=(DatasetConfig(path="inputs/records"),),
    steps=60,
    batch_size=4,
    optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_lr=1e-4, warmup_steps=10),
    checkpoint=CheckpointConfig(save_interval_steps=10),
)

IMAGE_SIZE, FRAMES = 64, 12
COLORS = {"red": (220, 40, 30), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (230, 210, 40)}
DIRECTIONS = {"left": -1, "right": 1}


def prepare(config: TrainConfig, out: Path) -> TrainConfig:
    """Create the model and the records in `out`/inputs, unless they exist.

    Args:
        config: The run config, with paths relative to `out`.
        out: The run directory.

    Returns:
        The config with paths that include `out`.
    """
    from vllama_jax.io.atomic import new_directory
    from vllama_jax.io.paths import require_local_output

    inputs = require_local_output(out) / "inputs"
    if not inputs.exists():
        with new_directory(inputs) as directory:
            _make_model(directory)
            _make_records(directory)
    datasets = tuple(dataclasses.replace(dataset, path=str(out / dataset.path)) for dataset in config.datasets)
    return dataclasses.replace(config, model=str(out / config.model), datasets=datasets)


def _make_model(directory: Path) -> None:
    from vllama_jax import convert
    from vllama_jax.convert.tiny import write_tiny

    files = write_tiny(directory / "weights")
    heads = json.loads(files.pop("config").read_text())
    llama = files.pop("llama")
    del files["vl"], files["al"]  # without trained branches, whose parameters are then initialized at random
    convert.convert(convert.plan(llama_directory=llama, files=files, config=heads), directory / "model")


def _make_records(directory: Path) -> None:
    from vllama_jax.data.build import build
    from vllama_jax.media.write import write_video

    clips = directory / "clips"
    clips.mkdir()
    lines = []
    for color, direction in itertools.product(COLORS, DIRECTIONS):
        name = f"{color}_{direction}.mp4"
        write_video(clips / name, _render_ball(color, direction), fps=8)
        lines.append(json.dumps({"video": name, "caption": f"a {color} ball rolls to the {direction}"}))
    (clips / "annotations.jsonl").write_text("\n".join(lines) + "\n")
    build("jsonl", clips, directory / "records")


def _render_ball(color: str, direction: str) -> Iterator[np.ndarray]:
    """Render frames [size, size, 3] of a ball that crosses a gray room."""
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    for number in range(FRAMES):
        position = IMAGE_SIZE * (0.5 + DIRECTIONS[direction] * (number / (FRAMES - 1) - 0.5) * 0.8)
        frame = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 120, np.uint8)
        frame[(columns - position) ** 2 + (rows - IMAGE_SIZE / 2) ** 2 < 10**2] = COLORS[color]
        yield frame
