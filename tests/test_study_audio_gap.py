"""The study of the audio scale and of the gap between modalities: its measures of vectors, and a small study."""

import json
import subprocess
import sys

import numpy as np
import pytest

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


@pytest.mark.slow
def test_a_small_study_is_complete_and_resumes(tmp_path):
    out = tmp_path / "study"
    sizes = {"clips": 12, "images": 8, "steps1": 2, "steps2": 2, "files": 20, "files-seed": 1}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "vllama_jax.miniature.studies.audio_gap", str(out), "--seeds", "5", *options]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    results = json.loads((out / "results.json").read_text())
    columns = {table["name"]: [setting["name"] for setting in table["settings"]] for table in results["tables"]}
    assert "20, positions × 20" in columns["audio_gap_scale"]
    assert {f"{name}.png" for name in (*columns, "audio_gap")} <= {file.name for file in out.iterdir()}
    (out / "results.json").unlink()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    assert "training" not in again.stderr.replace("training data", "")
