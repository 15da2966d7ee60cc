"""Train a miniature from scratch: the world, the frozen components, both branches in both stages, and baselines.

Every result is stored under OUT and reused, so that a run resumes where it was interrupted. Outputs become visible only
when they are complete. OUT/recipe.json records the seed and the recipe; a run with others is refused.
"""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from flax import nnx

from vllama_jax.checkpoints.digests import list_checkpoint_steps
from vllama_jax.errors import VllamaError
from vllama_jax.io.atomic import new_directory
from vllama_jax.miniature import audio_tower, captioner, language, towers
from vllama_jax.miniature.audio_tower import read_pairs
from vllama_jax.miniature.base_model import CONFIG, Weights, get_weights, load_or_train, prefix_weights, write_model
from vllama_jax.miniature.images import ImageSet, draw_images
from vllama_jax.miniature.run_records import Log, check_settings
from vllama_jax.miniature.world import Amounts, write_world
from vllama_jax.nn.imagebind import AudioTower
from vllama_jax.nn.llama import Llama
from vllama_jax.text.tokenizer import Tokenizer, load_tokenizer
from vllama_jax.train.config_files import load_config


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The sizes of the world and the steps of each training, as OUT/recipe.json records them.

    Attributes:
        amounts: The number of clips and images of the world.
        comparison_steps: Steps of the language model on comparisons alone.
        language_steps: Steps of the language model on all texts.
        pictures: Images that the vision towers and the image Q-Former are trained on.
        tower_steps: Steps of the vision towers.
        hearing_steps: Steps of the audio tower.
        captioner_steps: Steps of the image Q-Former.
        steps_of_runs: Steps of each stage of the branches, for tests; those of the run configs if 0.
    """

    amounts: Amounts = Amounts()  # noqa: RUF009 (immutable)
    comparison_steps: int = 400
    language_steps: int = 2400
    pictures: int = 40_000
    tower_steps: int = 2000
    hearing_steps: int = 500
    captioner_steps: int = 2000
    steps_of_runs: int = 0


def make_base_model(out: Path, seed: int, recipe: Recipe, log: Log) -> None:
    """Write the world, train the frozen components, and write the base models of the branches.

    Args:
        out: OUT, where OUT/base and, as a baseline, OUT/base_without_positions are written.
        seed: The seed of the world and of the frozen components.
        recipe: The sizes and steps.
        log: Called with progress messages.

    Raises:
        ConfigError: OUT was made with another seed or recipe.
    """
    check_settings(out / "recipe.json", {"seed": seed, **dataclasses.asdict(recipe)}, "another seed or recipe")
    if (out / "base_without_positions").exists():
        return
    write_world(out / "world", recipe.amounts, seed, log)
    tokenizer = _load_or_train_tokenizer(out, seed)
    folder = out / "parts"
    llama = load_or_train(
        folder,
        "llama",
        Llama(language.CONFIG, rngs=nnx.Rngs(0)),
        lambda: _train_language_model(tokenizer, recipe, seed, log),
    )
    images = draw_images(recipe.pictures, seed)
    vision = load_or_train(
        folder,
        "towers",
        towers.Towers(tokenizer.vocab_size, rngs=nnx.Rngs(0)),
        lambda: _train_towers(images, tokenizer, recipe, seed, log),
    )
    audio = load_or_train(
        folder,
        "hearing",
        AudioTower(audio_tower.AUDIO, towers.EMBED_DIM, rngs=nnx.Rngs(0)),
        lambda: audio_tower.train_audio_tower(
            vision.imagebind,
            read_pairs(list_audio_training_clips(out)),
            steps=recipe.hearing_steps,
            batch_size=96,
            seed=seed,
            log=log,
        ),
    )
    captions = load_or_train(
        folder,
        "captioner",
        captioner.Captioner(rngs=nnx.Rngs(0)),
        lambda: captioner.train_captioner(
            vision.eva, llama, images, tokenizer, steps=recipe.captioner_steps, batch_size=64, seed=seed, log=log
        ),
    )
    components = {
        "vit": vision.eva,
        "imagebind/vision": vision.imagebind,
        "imagebind/audio": audio,
        "llama": llama,
        "audio_llama_proj": captions.llama_proj,
    }
    weights = {path: value for name, one in components.items() for path, value in prefix_weights(name, one).items()}
    _write_base_models(out, {**weights, **get_weights(captions)}, seed)


def _train_language_model(tokenizer: Tokenizer, recipe: Recipe, seed: int, log: Log) -> Llama:
    """Train the language model, and log its accuracies on held-out combinations."""
    trained = language.train_language_model(
        tokenizer, comparison_steps=recipe.comparison_steps, steps=recipe.language_steps, seed=seed, log=log
    )
    for question, accuracy in language.measure_answers(trained, tokenizer, seed).items():
        log(f"language model, accuracy of {question} on held-out combinations: {accuracy:.3f}")
    return trained


def _train_towers(images: ImageSet, tokenizer: Tokenizer, recipe: Recipe, seed: int, log: Log) -> towers.Towers:
    """Train the vision towers, and log their accuracies on images that they were not trained on."""
    trained = towers.train_towers(images, tokenizer, steps=recipe.tower_steps, batch_size=64, seed=seed, log=log)
    test_images = draw_images(min(1000, recipe.pictures), seed, "test")
    for aspect, (eva, imagebind) in towers.measure_phrase_accuracy(trained, test_images, tokenizer).items():
        log(f"vision towers, accuracy of {aspect} on held-out combinations: EVA {eva:.3f}, ImageBind {imagebind:.3f}")
    return trained


def _load_or_train_tokenizer(out: Path, seed: int) -> Tokenizer:
    folder = out / "parts" / "tokenizer"
    if not folder.exists():
        with new_directory(folder) as directory:
            language.train_tokenizer(directory, seed)
    return load_tokenizer(folder)


def _write_base_models(out: Path, weights: Weights, seed: int) -> None:
    """Write both base models.

    Audio positions are initialized with the norm of the vectors that they are added to. With N(0, 1), as in the
    original, they have several times this norm, and the audio branch learned nothing in its first 700 steps.
    """
    embed_dim = CONFIG.require_imagebind().embed_dim
    positions = np.random.default_rng([seed, 4]).standard_normal((CONFIG.num_clip_positions, embed_dim), np.float32)
    weights = {**weights, "audio_positions": positions / np.float32(embed_dim**0.5)}
    if not (out / "base").exists():
        write_model(out / "base", weights, out / "parts" / "tokenizer")
    zeros = np.zeros((CONFIG.num_frame_positions, CONFIG.image_qformer.width), np.float32)
    write_model(out / "base_without_positions", {**weights, "frame_positions": zeros}, out / "parts" / "tokenizer")


def list_audio_training_clips(out: Path) -> list[Path]:
    """List the clips of stage 2 in which an object is visible at all times."""
    folder = out / "world" / "instructions"
    lines = [json.loads(line) for line in (folder / "annotations.jsonl").read_text().splitlines()]
    texts = {line["video"]: json.dumps(line["QA"]) for line in lines if "video" in line}
    return [folder / name for name, text in texts.items() if "appears" not in text and "vanishes" not in text]


def train_branches(out: Path, recipe: Recipe, log: Log) -> None:
    """Train both stages of both branches, and the vision branch again without frame positions as a baseline.

    Writes OUT/model and OUT/model_without_positions.

    Args:
        out: OUT, with the base models.
        recipe: The sizes and steps.
        log: Called with progress messages.

    Raises:
        VllamaError: A command failed or was stopped. The same call resumes.
    """
    _train_stages(out, "vision", "vision", str(out / "base"), recipe, log)
    _train_stages(out, "audio", "audio", str(out / "vision2"), recipe, log)
    options = ("--trainable", "video_qformer/*", "llama_proj/*")  # frame positions stay zero
    _train_stages(out, "vision", "without_positions", str(out / "base_without_positions"), recipe, log, options)
    models = {"model": ("base", "vision2"), "model_without_positions": ("base_without_positions", "without_positions2")}
    for name, (base, vision) in models.items():
        if not (out / name).exists():
            branches = ("--vl", str(out / vision), "--al", str(out / "audio2"))
            run_vllama(log, "convert", "--base", str(out / base), *branches, "--out", str(out / name))


def _train_stages(
    out: Path, branch: str, name: str, model: str, recipe: Recipe, log: Log, options: tuple[str, ...] = ()
) -> None:
    """Run `vllama features` and `vllama train` for both stages of a branch: OUT/NAME1 and OUT/NAME2."""
    cache = out / "features" / branch
    for stage, records in ((1, "captions"), (2, "instructions")):
        config = f"miniature_{branch}_stage{stage}"
        arguments: tuple[str, ...] = ("--model", model, "--datasets.0.path", str(out / "world" / "records" / records))
        run_vllama(log, "features", config, "--out", str(cache), *arguments)
        arguments += ("--data.feature-cache", str(cache), "--out", f"{out / name}{stage}", *options)
        arguments += ("--init", f"{out / name}1") if stage == 2 else ()
        arguments += ("--steps", str(recipe.steps_of_runs)) if recipe.steps_of_runs else ()
        run_vllama(log, "train", config, *arguments)
        steps = recipe.steps_of_runs or load_config(config)[0].steps
        if list_checkpoint_steps(out / f"{name}{stage}")[-1] < steps:
            raise VllamaError(f"{out / name}{stage} was stopped before its last step; run the same command to resume")


def run_vllama(log: Log, *arguments: str) -> None:
    """Run a vllama command in its own process, and log the command and its time.

    Args:
        log: Called with progress messages.
        *arguments: The command and its arguments.

    Raises:
        VllamaError: The command failed. It has printed the reason.
    """
    start_time = time.perf_counter()
    log(f"vllama {' '.join(arguments)}")
    program = "from vllama_jax.cli import main; main()"
    if subprocess.run([sys.executable, "-c", program, *arguments]).returncode:
        raise VllamaError(f"`vllama {arguments[0]}` failed, see above; run the same command to resume")
    log(f"  {time.perf_counter() - start_time:.0f} s")
