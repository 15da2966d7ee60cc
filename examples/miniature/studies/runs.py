"""What all studies share: a small world, and branches that are trained with one change.

A study starts from the frozen components of the miniature in the package, and trains with `vllama_jax.train`. It reuses
every result under OUT, so that the same command resumes a study that was interrupted:

OUT/study.json         the sizes and the model, which are compared with those of the command
OUT/world              clips and images, as records of captions and of instructions
OUT/base/NAME          base models, without the weights that the study trains from scratch
OUT/features/NAME      the outputs of the frozen encoders
OUT/runs/NAME          run directories
OUT/measures/NAME.json the measures of each run
OUT/results.json       all of them; OUT/*.png are the figures
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import vllama_jax as vl
from vllama_jax.branches import is_within
from vllama_jax.checkpoints.directory import open_model
from vllama_jax.checkpoints.restore import restore_weights
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.errors import ConfigError, VllamaError
from vllama_jax.io.atomic import replace_json
from vllama_jax.io.json_files import read_object
from vllama_jax.miniature.base_model import write_model
from vllama_jax.miniature.evaluate import Measure
from vllama_jax.miniature.run_records import Log, check_settings, make_log, total_minutes
from vllama_jax.miniature.studies.tables import Table, format_table, plot_tables
from vllama_jax.miniature.world import Amounts, write_world
from vllama_jax.runtime.compilation_cache import enable_compilation_cache
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.config_files import load_config
from vllama_jax.train.precompute import precompute_features
from vllama_jax.train.reporter import PrintReporter
from vllama_jax.train.run_directory import silence_orbax_save_logs
from vllama_jax.train.step import Loss

WORLD_SEED = 100  # of the clips and images that branches are trained on
MODEL = "miniature"
BATCH_SIZE = 16
STEPS_PER_LINE = 100  # of progress messages


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a study. Branches that are compared have the same.

    Attributes:
        clips: Clips in each of the two datasets of the world, captions and instructions.
        images: Images in each of them.
        steps1: Steps of stage 1.
        steps2: Steps of stage 2.
        files: Files that each measure asks about, with held-out combinations.
        files_seed: Seed of these files. The default was used for no choice of a setting.
    """

    clips: int = 1200
    images: int = 600
    steps1: int = 500
    steps2: int = 150
    files: int = 250
    files_seed: int = 2026


@dataclasses.dataclass(frozen=True)
class Study:
    """The directory of a study and its options.

    Attributes:
        out: OUT.
        seeds: Seeds of the runs: of new weights and of the order of records.
        sizes: The sizes.
        log: Called with progress messages.
    """

    out: Path
    seeds: tuple[int, ...]
    sizes: Sizes
    log: Log


def write_base(
    study: Study,
    name: str,
    config: VideoLlamaConfig,
    new: Sequence[str],
    changed: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write the miniature of the package as a base model with another config and without the weights of components.

    Args:
        study: The study.
        name: The name of the base model.
        config: Its config.
        new: The paths of the components that runs initialize at random.
        changed: Weights that replace those of the miniature, by path.

    Returns:
        OUT/base/NAME, which is not written again if it exists.
    """
    base, stored = study.out / "base" / name, open_model(MODEL)
    if not base.exists():
        kept = {leaf: shape for leaf, shape in stored.shapes.items() if not any(is_within(leaf, path) for path in new)}
        targets = {leaf: jax.ShapeDtypeStruct(shape, "float32") for leaf, shape in kept.items()}
        weights = {leaf: jax.device_get(value) for leaf, value in restore_weights(stored, targets).items()}
        write_model(base, {**weights, **(changed or {})}, stored.path / "tokenizer", config)
    return base


def make_config(study: Study, name: str, base: Path, features: str, **changes: Any) -> TrainConfig:
    """Make the run config of a branch.

    Args:
        study: The study.
        name: The config of the package that it starts from, such as "miniature_vision_stage1".
        base: The base model.
        features: The name of the feature cache.
        **changes: Fields with other values.

    Returns:
        The config, with the steps of its stage. Compiling takes as long as 200 steps, so sequences have one length, and
        dropout is 0: without it, runs with different seeds have the same programs.
    """
    config, _ = load_config(name)
    (dataset,) = config.datasets
    path = study.out / "world" / "records" / Path(dataset.path).name
    data = dataclasses.replace(
        config.data,
        feature_cache=str(study.out / "features" / features),
        length_buckets=config.data.length_buckets[-1:],
    )
    defaults = {
        "model": str(base),
        "datasets": (dataclasses.replace(dataset, path=str(path)),),
        "steps": study.sizes.steps1 if name.endswith("stage1") else study.sizes.steps2,
        "batch_size": BATCH_SIZE,
        "dropout": 0.0,
        "data": data,
        "remat_policy": "none",
    }
    return dataclasses.replace(config, **{**defaults, **changes})


def train_branch(study: Study, name: str, config: TrainConfig, loss: Loss | None = None) -> Path:
    """Train a branch, or resume its run. Features that the cache of the config does not have are computed first.

    Args:
        study: The study.
        name: The name of the run.
        config: The run config.
        loss: A loss function other than the cross-entropy, as for `vllama_jax.train`.

    Returns:
        OUT/runs/NAME.

    Raises:
        VllamaError: The run was stopped before its last step.
    """
    precompute_features(config, Path(config.data.feature_cache))
    run = study.out / "runs" / name
    study.log(f"training {name}")
    reporter = PrintReporter(config.steps, STEPS_PER_LINE, lambda line: study.log(f"  {line}"))
    result = vl.train(config, run, reporter=reporter, loss=loss)
    if result.step < config.steps:
        raise VllamaError(f"{run} was stopped before its last step; run the same command to resume")
    return run


def train_stages(
    study: Study, name: str, branch: str, base: Path, features: str, seed: int, loss: Loss | None = None
) -> Path:
    """Train a branch in both stages.

    Args:
        study: The study.
        name: The name of the branch, for its runs.
        branch: "vision" or "audio".
        base: The base model.
        features: The name of the feature cache.
        seed: The seed of both runs.
        loss: A loss function other than the cross-entropy, as for `vllama_jax.train`.

    Returns:
        OUT/runs/NAME_stage2.
    """
    run = ""
    for stage in (1, 2):
        config = make_config(study, f"miniature_{branch}_stage{stage}", base, features, seed=seed, init=run)
        run = str(train_branch(study, f"{name}_stage{stage}", config, loss))
    return Path(run)


def measure_once(study: Study, name: str, measure: Callable[[], dict[str, Measure]]) -> dict[str, Measure]:
    """Read the measures of OUT/measures/NAME.json, or compute and store them.

    Args:
        study: The study.
        name: The name of the measured model.
        measure: Computes the measures. What it trains first is not trained if the measures are there.

    Returns:
        The measures by name.
    """
    file = study.out / "measures" / f"{name}.json"
    if not file.exists():
        measures = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_json(file, measures)
    return read_object(file)


def run_study(out: Path, seeds: tuple[int, ...], sizes: Sizes, make_tables: Callable[[Study], list[Table]]) -> None:
    """Make a study, write OUT/results.json and the figures, and print the tables in Markdown.

    Args:
        out: OUT.
        seeds: The seeds of the runs.
        sizes: The sizes.
        make_tables: Trains, measures, and returns the tables.

    Raises:
        ConfigError: An option is out of range, or OUT was made with other sizes or another model.
        VllamaError: A run was stopped.
    """
    enable_compilation_cache()
    silence_orbax_save_logs()
    start_time, is_new, file = time.perf_counter(), not out.exists(), out / "results.json"
    study = Study(out, seeds, sizes, make_log(start_time))
    _check_options(study)
    settings = {"model": open_model(MODEL).digest, **dataclasses.asdict(sizes)}
    check_settings(out / "study.json", settings, "other settings")
    write_world(out / "world", Amounts(sizes.clips, sizes.images, sizes.clips, sizes.images), WORLD_SEED, study.log)
    tables = make_tables(study)
    minutes = total_minutes(file, start_time, is_new)
    content = {"seeds": seeds, **settings, "minutes": minutes, "tables": [dataclasses.asdict(one) for one in tables]}
    replace_json(file, content)
    plot_tables(tables, out)
    print("\n\n".join(map(format_table, tables)))


def _check_options(study: Study) -> None:
    """Raise ConfigError for options that are out of range."""
    check_numbers("--seeds", study.seeds, 0)
    for name, value in dataclasses.asdict(study.sizes).items():
        check_numbers(f"--{name.replace('_', '-')}", (value,), 0 if name == "files_seed" else 1)


def check_numbers(option: str, numbers: Sequence[int], low: int, high: int | None = None) -> None:
    """Check the numbers of an option.

    Args:
        option: The option, for the message.
        numbers: The numbers, of which there must be at least one, and none twice.
        low: The lowest valid number.
        high: The highest one, if there is one.

    Raises:
        ConfigError: A number is out of range or occurs twice, or there is none.
    """
    valid = range(low, sys.maxsize if high is None else high + 1)
    if not numbers or len(set(numbers)) < len(numbers) or not all(number in valid for number in numbers):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        given = ", ".join(map(str, numbers)) or "none"
        raise ConfigError(f"{option} must be {limits}, and no number may occur twice, not {given}")
