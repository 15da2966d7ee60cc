"""The study of the audio scale and of the gap between modalities: its measures of vectors, and a small study."""

import subprocess
import sys

import numpy as np
import pytest

from vllama_jax.errors import ConfigError
from vllama_jax.miniature.studies import tables
from vllama_jax.miniature.studies.modality_gap import (
    VectorPairs,
    compare_vectors,
    compute_norms,
    measure_gap,
    move_by,
    plot_gap,
    scale_to,
)

KINDS = ["bell", "drum", "bell"]
SHIFT = np.array([0, 0, 0.5], np.float32)


@pytest.fixture
def pairs() -> VectorPairs:
    """Two vectors of each file: image vectors in two directions, one for each kind, and the same moved by -SHIFT."""
    images = np.repeat(np.eye(3, dtype=np.float32)[[0, 1, 0]][:, None], 2, axis=1)
    return VectorPairs(images - SHIFT, images)


def test_the_gap_of_vectors_that_are_moved_is_known(pairs):
    gap = measure_gap(pairs, KINDS)
    norm, within = np.sqrt(1.25), 4 / 9  # of two directions with shares of 2/3 and 1/3: 2 · 2/3 · 1/3
    expected = {"norm": norm, "same kind": 1 / norm, "other kinds": 0, "distance": 0.5, "kind": 1}
    assert gap == pytest.approx({**expected, "between": 0.0625 / (0.0625 + within)}, abs=1e-6)
    assert pairs.centroid_difference == pytest.approx(SHIFT)
    closed = measure_gap(VectorPairs(move_by(SHIFT, keep_norm=False)(pairs.audio), pairs.images), KINDS)
    expected = {"norm": 1, "same kind": 1, "other kinds": 0, "distance": 0, "between": 0, "kind": 1}
    assert closed == pytest.approx(expected, abs=1e-6)


def test_vectors_of_the_same_file_are_not_compared_within_a_modality(pairs):
    same, other = compare_vectors(pairs.images, pairs.images, KINDS)
    assert (same.tolist(), other.tolist()) == ([1] * 8, [0] * 16)  # files 0 and 2 are of the same kind
    same, _ = compare_vectors(pairs.audio, pairs.images, KINDS)
    assert len(same) == 20


def test_norms_of_changed_vectors(pairs):
    assert compute_norms(scale_to(20)(pairs.audio)) == pytest.approx(20)
    moved = move_by(SHIFT, keep_norm=True)(3 * pairs.images)
    assert compute_norms(moved) == pytest.approx(3)
    assert moved[0, 0] == pytest.approx(np.array([3, 0, 0.5]) * 3 / np.sqrt(9.25))


def test_the_gap_is_drawn_without_a_display(tmp_path, pairs):
    figure = plot_gap(pairs, KINDS)
    figure.savefig(tmp_path / "gap.png")
    cosines, kinds = figure.axes
    assert len(cosines.get_legend_handles_labels()[1]) == 4
    assert {text.get_text() for text in kinds.texts} == {"bell", "drum"}


@pytest.mark.parametrize("trainings", [(), ("noise", "noise")])
def test_no_training_or_the_same_twice_is_an_error(tmp_path, trainings):
    from vllama_jax.miniature.studies import audio_gap

    with pytest.raises(ConfigError, match="--trainings needs at least one name, and no name may occur twice"):
        audio_gap.main(tmp_path / "out", trainings=trainings)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_study_has_all_tables(tmp_path):
    sizes = ["--clips", "12", "--images", "8", "--steps1", "2", "--steps2", "2", "--files", "20", "--seeds", "5"]
    command = [sys.executable, "-m", "vllama_jax.miniature.studies.audio_gap", str(tmp_path / "out"), *sizes]
    done = subprocess.run([*command, "--trainings", "noise"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {table.name: table for table in tables.read_tables(tmp_path / "out" / "results.json")}
    assert done.stdout == "\n\n".join(map(tables.format_table, found.values())) + "\n"
    assert {file.stem for file in (tmp_path / "out").glob("*.png")} == {*found, "audio_gap"}
    trained = [f"audio_gap_trained_{name}" for name in ("images", "norm_1", "norm_20")]
    assert list(found) == ["audio_gap_scale", "audio_gap_moved", *trained]
    assert all(len(found[name].settings) == 1 for name in trained)
    scales, moved = ({one.name: one for one in found[name].settings} for name in list(found)[:2])
    assert scales["1"].seeds == moved["as they are"].seeds  # the same vectors
    order = [scales[name].seeds[0]["sound_order"]["accuracy"] for name in ("1", "20")]
    assert order[0] > order[1] + 0.2  # of the model in the package
    facts = [float(moved[name].facts["distance to the image centroid"]) for name in ("as they are", "moved")]
    assert facts[0] > facts[1]
