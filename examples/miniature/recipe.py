"""From nothing to a model: the world, its frozen parts, both branches in both stages, and what is compared with them.

Everything that a run makes is kept under OUT and not made again, so that a run that was stopped goes on; what is there
is whole. OUT/recipe.json says of which seed and recipe it is.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx

from vllama_jax.checkpoints.digests import list_checkpoint_steps
from vllama_jax.config import describe_changes, flatten_fields
from vllama_jax.errors import ConfigError, VllamaError
from vllama_jax.io.atomic import new_directory, replace_json
from vllama_jax.io.json_files import read_object
from vllama_jax.miniature import audio_tower, captioner, language, towers
from vllama_jax.miniature.audio_tower import read_pairs
from vllama_jax.miniature.base_model import CONFIG, Weights, get_weights, load_or_train, prefix_weights, write_model
from vllama_jax.miniature.images import draw_images
from vllama_jax.miniature.world import Amounts, write_world
from vllama_jax.nn.imagebind import AudioTower
from vllama_jax.nn.llama import Llama
from vllama_jax.text.tokenizer import Tokenizer, load_tokenizer
from vllama_jax.train.config_files import load_config

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How much of each step. steps_of_runs: of both branches' stages, by config; their own where 0 (for tests)."""

    amounts: Amounts = Amounts()  # noqa: RUF009 (it is frozen)
    comparison_steps: int = 400
    language_steps: int = 1200
    pictures: int = 40_000
    tower_steps: int = 2000
    hearing_steps: int = 500
    captioner_steps: int = 2000
    steps_of_runs: int = 0


def make_base_model(out: Path, seed: int, recipe: Recipe, log: Log) -> None:
    """The world, the frozen parts, OUT/base, and OUT/base_without_positions for the comparison.

    Raises ConfigError where OUT is of another seed or recipe.
    """
    _begin(out, seed, recipe)
    if (out / "base_without_positions").exists():
        return
    write_world(out / "world", recipe.amounts, seed, log)
    tokenizer = _tokenizer(out, seed)
    parts = out / "parts"
    llama = load_or_train(
        parts,
        "llama",
        Llama(language.CONFIG, rngs=nnx.Rngs(0)),
        lambda: language.train_language_model(
            tokenizer, comparison_steps=recipe.comparison_steps, steps=recipe.language_steps, seed=seed, log=log
        ),
    )
    pictures = draw_images(recipe.pictures, seed)
    seen = load_or_train(
        parts,
        "towers",
        towers.Towers(tokenizer.vocab_size, rngs=nnx.Rngs(0)),
        lambda: towers.train_towers(pictures, tokenizer, steps=recipe.tower_steps, batch_size=64, seed=seed, log=log),
    )
    found = towers.measure_phrase_accuracy(seen, draw_images(1000, seed, "test"), tokenizer)
    for aspect, (eva, imagebind) in found.items():
        log(f"picture towers, unseen combinations, {aspect}: EVA {eva:.3f}, ImageBind {imagebind:.3f}")
    heard = load_or_train(
        parts,
        "hearing",
        AudioTower(audio_tower.AUDIO, towers.EMBED_DIM, rngs=nnx.Rngs(0)),
        lambda: audio_tower.train_audio_tower(
            seen.imagebind,
            read_pairs(list_audio_training_clips(out)),
            steps=recipe.hearing_steps,
            batch_size=96,
            seed=seed,
            log=log,
        ),
    )
    told = load_or_train(
        parts,
        "captioner",
        captioner.Captioner(rngs=nnx.Rngs(0)),
        lambda: captioner.train_captioner(
            seen.eva, llama, pictures, tokenizer, steps=recipe.captioner_steps, batch_size=64, seed=seed, log=log
        ),
    )
    named = {
        "vit": seen.eva,
        "imagebind/vision": seen.imagebind,
        "imagebind/audio": heard,
        "llama": llama,
        "audio_llama_proj": told.llama_proj,
    }
    weights = {path: value for name, one in named.items() for path, value in prefix_weights(name, one).items()}
    _write_bases(out, {**weights, **get_weights(told)}, seed)


def _begin(out: Path, seed: int, recipe: Recipe) -> None:
    """Writes down what OUT is of, or checks that it is of the same."""
    file, asked = out / "recipe.json", {"seed": seed, **dataclasses.asdict(recipe)}
    if not file.exists():
        replace_json(file, asked)
    if differences := describe_changes(flatten_fields(read_object(file)), flatten_fields(asked)):
        raise ConfigError(f"{out} was begun otherwise ({', '.join(differences[:3])}); name another directory")


def _tokenizer(out: Path, seed: int) -> Tokenizer:
    folder = out / "parts" / "tokenizer"
    if not folder.exists():
        with new_directory(folder) as directory:
            language.train_tokenizer(directory, seed)
    return load_tokenizer(folder)


def _write_bases(out: Path, weights: Weights, seed: int) -> None:
    """Both bases. Sound positions start as long as the vectors that they are added to.

    The original's start from N(0, 1), many times as long; the audio branch learned nothing in its first 700 steps then.
    """
    embed_dim = CONFIG.require_imagebind().embed_dim
    places = np.random.default_rng([seed, 4]).standard_normal((CONFIG.num_clip_positions, embed_dim), np.float32)
    weights = {**weights, "audio_positions": places / np.float32(embed_dim**0.5)}
    if not (out / "base").exists():
        write_model(out / "base", weights, out / "parts" / "tokenizer")
    rows = np.zeros((CONFIG.num_frame_positions, CONFIG.image_qformer.width), np.float32)
    write_model(out / "base_without_positions", {**weights, "frame_positions": rows}, out / "parts" / "tokenizer")


def list_audio_training_clips(out: Path) -> list[Path]:
    """Clips in which something is seen from the beginning to the end."""
    folder = out / "world" / "instructions"
    lines = [json.loads(line) for line in (folder / "annotations.jsonl").read_text().splitlines()]
    said = {line["video"]: json.dumps(line["QA"]) for line in lines if "video" in line}
    return [folder / name for name, text in said.items() if "appears" not in text and "vanishes" not in text]


def train_branches(out: Path, recipe: Recipe, log: Log) -> None:
    """Both stages of both branches, and the vision branch once more without frame positions; joined in OUT/model."""
    _stages(out, "vision", "vision", str(out / "base"), recipe, log)
    _stages(out, "audio", "audio", str(out / "vision2"), recipe, log)
    patterns = ("video_qformer/*", "llama_proj/*")
    without = ("--trainable", *patterns)
    _stages(out, "vision", "without_positions", str(out / "base_without_positions"), recipe, log, without)
    joined = {"model": ("base", "vision2"), "model_without_positions": ("base_without_positions", "without_positions2")}
    for name, (of, vision) in joined.items():
        if not (out / name).exists():
            branches = ("--vl", str(out / vision), "--al", str(out / "audio2"))
            run_vllama(log, "convert", "--base", str(out / of), *branches, "--out", str(out / name))


def _stages(
    out: Path, branch: str, name: str, model: str, recipe: Recipe, log: Log, options: tuple[str, ...] = ()
) -> None:
    """`vllama features` and `vllama train` of a branch's two stages: OUT/NAME1 and OUT/NAME2."""
    cache = out / "features" / branch
    for stage, records in ((1, "captions"), (2, "instructions")):
        config = f"miniature_{branch}_stage{stage}"
        given: tuple[str, ...] = ("--model", model, "--datasets.0.path", str(out / "world" / "records" / records))
        run_vllama(log, "features", config, "--out", str(cache), *given)
        given += ("--data.feature-cache", str(cache), "--out", f"{out / name}{stage}", *options)
        given += ("--init", f"{out / name}1") if stage == 2 else ()
        given += ("--steps", str(recipe.steps_of_runs)) if recipe.steps_of_runs else ()
        run_vllama(log, "train", config, *given)
        steps = recipe.steps_of_runs or load_config(config)[0].steps
        if list_checkpoint_steps(out / f"{name}{stage}")[-1] < steps:
            raise VllamaError(f"{out / name}{stage} was stopped before its end; run the same command again to go on")


def run_vllama(log: Log, *arguments: str) -> None:
    """Runs `vllama …` in a process of its own, and says which. Raises VllamaError when it fails."""
    began = time.perf_counter()
    log(f"vllama {' '.join(arguments)}")
    program = "from vllama_jax.cli import main; main()"
    if subprocess.run([sys.executable, "-c", program, *arguments]).returncode:
        raise VllamaError(f"`vllama {arguments[0]}` failed, as it says above; run the same command again to go on")
    log(f"  {time.perf_counter() - began:.0f} s")
