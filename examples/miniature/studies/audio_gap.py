"""The scale of audio vectors, and the gap between them and image vectors: what they cost, and what closes it.

    python -m vllama_jax.miniature.studies.audio_gap OUT [--seeds 0 1 2]

The audio branch is trained on ImageBind's vectors of images, and then given its vectors of audio. The first tables
change the audio vectors of the model in the package. The others are of its audio branch, trained further in several
ways. docs/studies/audio_gap.md has the results.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int

from vllama_jax.errors import ConfigError
from vllama_jax.media_tokens import prepare_media
from vllama_jax.miniature import holdout_files
from vllama_jax.miniature.base_model import get_weights, set_weights
from vllama_jax.miniature.command import run_command
from vllama_jax.miniature.evaluate import FileSets, Measure, evaluate_sets
from vllama_jax.miniature.holdout_files import EncodedFiles, FileSet, read_files
from vllama_jax.miniature.images import map_in_processes
from vllama_jax.miniature.recipe import list_audio_training_clips
from vllama_jax.miniature.studies.modality_gap import (
    Change,
    VectorPairs,
    compute_norms,
    embed_files,
    measure_gap,
    move_by,
    plot_gap,
    scale_to,
)
from vllama_jax.miniature.studies.runs import (
    MODEL,
    Sizes,
    Study,
    measure_once,
    run_study,
    train_stages,
    write_base,
)
from vllama_jax.miniature.studies.tables import Setting, Table
from vllama_jax.model import Model, load
from vllama_jax.nn.dropout import Dropout
from vllama_jax.nn.video_llama import VideoLlama
from vllama_jax.text.prompts import Media
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.step import Batch, Loss, loss_sum

MEASURES = ("sound_only", "sound_order", "sound_order_of_short")
FILE_SETS = (holdout_files.SOUNDS, holdout_files.TWO_SOUNDS, holdout_files.TWO_SHORT)
NORMS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
PUBLISHED_NORM = NORMS[-1]  # of the audio vectors of published weights; their image vectors have norm 1
TrainingName = Literal["norm_1", "norm_20", "noise"]
CENTROID_CLIPS = 200  # of the training data, to estimate the centroids on
QFORMER, POSITIONS = "audio_qformer", "audio_positions"
KEYS, VALUES = (f"{QFORMER}/cross_layers/cross_attention/{name}/kernel" for name in ("key", "value"))


@dataclasses.dataclass(frozen=True)
class Training:
    """A way of training the audio branch further.

    Attributes:
        title: The heading of its column.
        norm: The norm of image vectors. Positions are multiplied by it before training.
        noise: The norm of the normally distributed noise that is added to image vectors, relative to theirs.
    """

    title: str
    norm: float = 1.0
    noise: float = 0.0


TRAININGS: dict[TrainingName, Training] = {
    "norm_1": Training("norm 1"),
    "norm_20": Training("norm 20", norm=PUBLISHED_NORM),
    "noise": Training("norm 1, with noise", noise=1.0),
}


@dataclasses.dataclass(frozen=True)
class HoldoutVectors:
    """The vectors of the held-out files of all measures.

    Attributes:
        sets: The file sets, without their files.
        encoded: The audio of each file set.
        pairs: The vectors of audio and frames of each file set.
    """

    sets: FileSets
    encoded: dict[FileSet, EncodedFiles]
    pairs: dict[FileSet, VectorPairs]

    def measure_audio(self, model: Model, change: Change) -> dict[str, Measure]:
        """Measure a model with changed audio vectors."""
        return self._measure(model, {files: change(pairs.audio) for files, pairs in self.pairs.items()})

    def measure_images(self, model: Model, change: Change) -> dict[str, Measure]:
        """Measure a model with the changed image vectors of the same files in place of their audio vectors."""
        return self._measure(model, {files: change(pairs.images) for files, pairs in self.pairs.items()})

    def _measure(self, model: Model, vectors: dict[FileSet, np.ndarray]) -> dict[str, Measure]:
        files = {one: dataclasses.replace(self.encoded[one], audio_vectors=array) for one, array in vectors.items()}
        return evaluate_sets(self.sets.for_model(model).with_files(files), MEASURES)

    def describe(self, audio_vectors: Change) -> dict[str, str]:
        """Return the measures of the gap, of the files with one sound, as rows of a table."""
        files = holdout_files.SOUNDS
        pairs, scenes = self.pairs[files], self.encoded[files].scenes
        gap = measure_gap(VectorPairs(audio_vectors(pairs.audio), pairs.images), [one.sounds[0] for one in scenes])
        return {
            "mean norm": f"{gap['norm']:.2f}",
            "cosine with images of the same kind": f"{gap['same kind']:.2f}",
            "cosine with images of other kinds": f"{gap['other kinds']:.2f}",
            "distance to the image centroid": f"{gap['distance']:.2f}",
            "share of variance between modalities": f"{gap['between']:.2f}",
            "kind's part, over that of images": f"{gap['kind']:.2f}",
        }


def encode_holdout(study: Study, model: Model) -> HoldoutVectors:
    """Write the held-out files of all measures as videos with audio, and embed their audio and their frames."""
    encoded, pairs = {}, {}
    for files in FILE_SETS:
        study.log(f"rendering and encoding {study.sizes.files} files of {files.seconds:g} s of the set '{files.name}'")
        videos = dataclasses.replace(files, has_frames=True)
        scenes, prepared = read_files(model.config, videos, study.sizes.files_seed, study.sizes.files)
        pairs[files] = embed_files(model, prepared)
        encoded[files] = EncodedFiles(scenes, [Media("audio")] * len(scenes), None, pairs[files].audio)
    sets = FileSets(model, study.sizes.files_seed, study.sizes.files, study.log)
    return HoldoutVectors(sets, encoded, pairs)


def estimate_shift(study: Study, model: Model) -> np.ndarray:
    """Estimate the difference of the centroids, float32 [e], on clips of the training data."""
    clips = list_audio_training_clips(study.out)[:CENTROID_CLIPS]
    study.log(f"estimating the centroids on {len(clips)} clips of the training data")
    prepared = map_in_processes(functools.partial(prepare_media, config=model.config), clips)
    return embed_files(model, prepared).centroid_difference


def compare_scales(study: Study, model: Model, vectors: HoldoutVectors) -> Table:
    """Measure the model of the package with audio vectors of several norms.

    Longer vectors change three things: their ratio to positions, the logits of attention, and the values. The last
    settings change one of them as the published norm does, by scaling positions and the weights of keys or values.
    """
    published, inverse = PUBLISHED_NORM, 1 / PUBLISHED_NORM
    factors: dict[str, tuple[float, dict[str, float]]] = {f"{norm:g}": (norm, {}) for norm in NORMS}
    factors |= {
        f"{published:g}, positions × {published:g}": (published, {POSITIONS: published}),
        "only ratio": (1.0, {POSITIONS: inverse}),
        "only attention": (published, {POSITIONS: published, VALUES: inverse}),
        "only values": (published, {POSITIONS: published, KEYS: inverse}),
    }
    settings = []
    for heading, (norm, scaled_weights) in factors.items():
        scaled = scale_weights(model, scaled_weights)
        positions = compute_norms(np.asarray(scaled.network.audio_positions[...])).mean()
        facts = {"mean norm of positions": f"{positions:.2f}", "norm over that": f"{norm / positions:.2f}"}
        measures = measure_once(
            study,
            f"scale_{_make_name(heading)}",
            functools.partial(vectors.measure_audio, scaled, scale_to(norm)),
        )
        settings.append(Setting(heading, facts, [measures]))
    return Table("audio_gap_scale", "The model of the package, by the norm of audio vectors", settings)


def scale_weights(model: Model, factors: Mapping[str, float]) -> Model:
    """Return the model with weights multiplied by factors, which are given by path."""
    weights = get_weights(model.network)
    scaled = {path: weights[path] * np.float32(factor) for path, factor in factors.items()}
    return dataclasses.replace(model, network=set_weights(model.network, {**weights, **scaled}))


def _make_name(heading: str) -> str:
    """Return the name of a file for the heading of a column."""
    return heading.replace(",", "").replace("×", "times").replace(" ", "_")


def compare_positions_in_gap(study: Study, model: Model, vectors: HoldoutVectors) -> Table:
    """Measure the model of the package with audio vectors that are moved toward the image vectors, and with those."""
    shift = estimate_shift(study, model)
    changes: dict[str, Change] = {
        "as they are": scale_to(1.0),
        "half-way": move_by(shift / 2, keep_norm=False),
        "half-way, norm 1": move_by(shift / 2, keep_norm=True),
        "moved": move_by(shift, keep_norm=False),
        "moved, norm 1": move_by(shift, keep_norm=True),
        f"moved, norm {PUBLISHED_NORM:g}": lambda vectors: scale_to(PUBLISHED_NORM)(vectors + shift),
    }
    settings = []
    for heading, change in changes.items():
        measures = measure_once(
            study, f"gap_{_make_name(heading)}", functools.partial(vectors.measure_audio, model, change)
        )
        settings.append(Setting(heading, vectors.describe(change), [measures]))
    images = measure_once(study, "images", lambda: vectors.measure_images(model, scale_to(1.0)))
    facts = dict.fromkeys(settings[0].facts, "–")
    settings.append(Setting("image vectors", facts, [images]))
    return Table("audio_gap_moved", "The model of the package, by the place of audio vectors in the gap", settings)


def make_loss(training: Training) -> Loss:
    """Make the loss of a way of training: the cross-entropy, of changed image vectors."""

    def loss_of_changed_images(
        network: VideoLlama, batch: Batch, config: TrainConfig, dropout: Dropout | None
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        images = batch["features"]
        if training.noise:  # with the batch as its seed, since a loss is given no key
            key = jax.random.key(jax.lax.bitcast_convert_type(jnp.sum(images), jnp.uint32))
            noise = jax.random.normal(key, images.shape)
            images = images + noise * (training.noise / images.shape[-1] ** 0.5)
            images = images / jnp.linalg.norm(images, axis=-1, keepdims=True)
        return loss_sum(network, {**batch, "features": images * training.norm}, config, dropout)

    return loss_of_changed_images


def train_audio_branch(study: Study, model: Model, name: TrainingName, seed: int) -> Path:
    """Train both stages of a model's audio branch in one of TRAININGS, and return the run directory of stage 2."""
    training = TRAININGS[name]
    positions = np.asarray(model.network.audio_positions[...]) * np.float32(training.norm)
    base = write_base(study, name, model.config, (), {POSITIONS: positions})
    return train_stages(study, f"{name}_seed{seed}", "audio", base, "audio", seed, make_loss(training))


def compare_trainings(study: Study, names: Sequence[TrainingName], vectors: HoldoutVectors) -> list[Table]:
    """Train the branch further in several of TRAININGS, and compare it with image and audio vectors of two norms."""
    results = {name: [measure_training(study, name, seed, vectors) for seed in study.seeds] for name in names}
    titles = {
        "images": "Trained further, image vectors of the norm of their training in place of audio vectors",
        "norm_1": "Trained further, audio vectors of norm 1",
        "norm_20": f"Trained further, audio vectors of norm {PUBLISHED_NORM:g}",
    }
    return [
        Table(
            f"audio_gap_trained_{key}",
            title,
            [Setting(TRAININGS[name].title, {}, [one[key] for one in seeds]) for name, seeds in results.items()],
        )
        for key, title in titles.items()
    ]


def measure_training(
    study: Study, name: TrainingName, seed: int, vectors: HoldoutVectors
) -> dict[str, dict[str, Measure]]:
    """Train a branch, and measure it with image vectors as in its training, and with audio vectors of two norms."""
    model = functools.cache(lambda: load(train_audio_branch(study, vectors.sets.model, name, seed)))
    norm = TRAININGS[name].norm
    changes = {
        "images": lambda: vectors.measure_images(model(), scale_to(norm)),
        "norm_1": lambda: vectors.measure_audio(model(), scale_to(1.0)),
        "norm_20": lambda: vectors.measure_audio(model(), scale_to(PUBLISHED_NORM)),
    }
    return {key: measure_once(study, f"{name}_seed{seed}_{key}", measure) for key, measure in changes.items()}


def make_tables(study: Study, trainings: Sequence[TrainingName]) -> list[Table]:
    """Make all tables of the study, and draw the gap in OUT/audio_gap.png.

    Args:
        study: The study.
        trainings: The names of the TRAININGS to compare.
    """
    model = load(MODEL)
    vectors = encode_holdout(study, model)
    kinds = [scene.sounds[0] for scene in vectors.encoded[holdout_files.SOUNDS].scenes]
    plot_gap(vectors.pairs[holdout_files.SOUNDS], kinds).savefig(study.out / "audio_gap.png", dpi=80)
    tables = [compare_scales(study, model, vectors), compare_positions_in_gap(study, model, vectors)]
    return tables + compare_trainings(study, trainings, vectors)


def main(
    out: Path,
    /,
    *,
    trainings: tuple[TrainingName, ...] = ("norm_1", "norm_20", "noise"),
    seeds: tuple[int, ...] = (0, 1, 2),
    sizes: Annotated[Sizes, tyro.conf.arg(name="")] = Sizes(),  # noqa: B008 (immutable)
) -> None:
    """Measure what the scale of audio vectors and the gap to image vectors cost. The same command resumes.

    Args:
        out: The output directory.
        trainings: The ways of training the branch to compare.
        seeds: The seeds of the runs: of the order of records.
        sizes: The sizes of the study.
    """
    if not trainings or len(set(trainings)) < len(trainings):
        raise ConfigError("--trainings needs at least one name, and no name may occur twice")
    run_study(out, seeds, sizes, lambda study: make_tables(study, trainings))


if __name__ == "__main__":
    run_command("vllama_jax.miniature.studies.audio_gap", main)
