"""The gap between ImageBind's vectors of audio and of images: its measures, and changes of audio vectors."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllama_jax.media_tokens import PreparedMedia
from vllama_jax.miniature.holdout_files import encode
from vllama_jax.model import Model

Change = Callable[[np.ndarray], np.ndarray]  # of vectors [..., e]
BINS = 80  # of cosines, in the figure


@dataclasses.dataclass(frozen=True)
class VectorPairs:
    """ImageBind's vectors of the audio and of the frames of the same n files.

    Attributes:
        audio: Of s audio clips of each file, float32 [n, s, e].
        images: Of t frames of each file, float32 [n, t, e].
    """

    audio: np.ndarray
    images: np.ndarray

    @property
    def centroid_difference(self) -> np.ndarray:
        """The mean of all image vectors minus the mean of all audio vectors, float32 [e]."""
        return self.images.mean(axis=(0, 1)) - self.audio.mean(axis=(0, 1))


def embed_files(model: Model, prepared: Sequence[PreparedMedia]) -> VectorPairs:
    """Embed the audio and the frames of files that have both."""
    return VectorPairs(encode(model, prepared, "mel", "embed_audio"), encode(model, prepared, "frames", "embed_frames"))


def compute_norms(vectors: np.ndarray) -> np.ndarray:
    """Compute the norms of vectors: [..., e] → [..., 1]."""
    return np.linalg.norm(vectors, axis=-1, keepdims=True)


def scale_to(norm: float) -> Change:
    """Make a change that scales vectors to a norm."""
    return lambda vectors: vectors * (np.float32(norm) / compute_norms(vectors))


def move_by(shift: np.ndarray, *, keep_norm: bool) -> Change:
    """Make a change that adds a vector.

    Args:
        shift: The vector, float32 [e].
        keep_norm: Scale the sums to the norms that the vectors had.
    """

    def move(vectors: np.ndarray) -> np.ndarray:
        moved = vectors + shift
        return moved * (compute_norms(vectors) / compute_norms(moved)) if keep_norm else moved

    return move


def measure_gap(pairs: VectorPairs, kinds: Sequence[str]) -> dict[str, float]:
    """Measure the gap between the audio and the image vectors of files.

    Args:
        pairs: The vectors.
        kinds: The kind of object that is visible and audible in each file. There are several.

    Returns:
        "norm": mean norm of the audio vectors. "same kind", "other kinds": mean cosine of an audio vector and an image
        vector of files of the same kind or of different kinds. "distance": between the means of both. "between": share
        of the variance of all vectors that lies between these means, if both modalities have the same weight. "kind":
        mean norm of a kind's part in audio vectors, which is the mean of its vectors minus that of all kinds, divided
        by the same of image vectors.
    """
    same, other = compare_vectors(pairs.audio, pairs.images, kinds)
    squared_distance = np.sum(np.square(pairs.centroid_difference))
    within = np.mean([np.sum(np.var(vectors, axis=(0, 1))) for vectors in (pairs.audio, pairs.images)])
    between = squared_distance / 4  # the variance of two means with the same weight
    values = {"norm": compute_norms(pairs.audio).mean(), "same kind": same.mean(), "other kinds": other.mean()}
    values |= {"distance": np.sqrt(squared_distance), "between": between / (between + within)}
    parts = [_average_kinds(vectors, kinds) for vectors in (pairs.audio, pairs.images)]
    audio, images = (compute_norms(means - means.mean(axis=0)).mean() for means in parts)
    values["kind"] = audio / images
    return {name: float(value) for name, value in values.items()}


def compare_vectors(first: np.ndarray, second: np.ndarray, kinds: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Compute the cosines of all pairs of vectors.

    Args:
        first: Vectors of n files, [n, s, e].
        second: Vectors of the same files, [n, t, e]. If it is `first`, pairs of the same file are left out.
        kinds: The kind of each file.

    Returns:
        The cosines of vectors of the same kind, and those of different kinds.
    """
    units = [(vectors / compute_norms(vectors)).reshape(-1, vectors.shape[-1]) for vectors in (first, second)]
    files = [np.repeat(np.arange(len(kinds)), vectors.shape[1]) for vectors in (first, second)]
    rows, columns = (np.asarray(kinds)[numbers] for numbers in files)
    cosines, is_same = units[0] @ units[1].T, rows[:, None] == columns
    is_counted = files[0][:, None] != files[1] if first is second else True
    return cosines[is_same & is_counted], cosines[~is_same]


def _average_kinds(vectors: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
    """Average the vectors of each kind, in alphabetical order: [n, s, e] → [kinds, e]."""
    return np.stack([vectors[np.asarray(kinds) == kind].mean(axis=(0, 1)) for kind in sorted(set(kinds))])


def plot_gap(pairs: VectorPairs, kinds: Sequence[str]) -> Figure:
    """Plot the cosines within and between the modalities, and the mean vectors of each kind.

    Args:
        pairs: The vectors.
        kinds: The kind of each file.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(ncols=2)
    _draw_cosines(left, pairs, kinds)
    _draw_kinds(right, pairs, kinds)
    return figure


def _draw_cosines(axes: Axes, pairs: VectorPairs, kinds: Sequence[str]) -> None:
    same, other = compare_vectors(pairs.audio, pairs.images, kinds)
    cosines = {
        "two images, same kind": compare_vectors(pairs.images, pairs.images, kinds)[0],
        "two audio clips, same kind": compare_vectors(pairs.audio, pairs.audio, kinds)[0],
        "audio and image, same kind": same,
        "audio and image, other kinds": other,
    }
    for name, values in cosines.items():
        axes.hist(values, BINS, range=(-1, 1), density=True, histtype="step", label=name)
    axes.set(xlabel="cosine", ylabel="density", xlim=(-1, 1))
    axes.legend(loc="upper left", fontsize="small")


def _draw_kinds(axes: Axes, pairs: VectorPairs, kinds: Sequence[str]) -> None:
    """Draw the means of each kind in the plane of their two largest principal components."""
    audio, images = (_average_kinds(vectors, kinds) for vectors in (pairs.audio, pairs.images))
    center = np.concatenate([audio, images]).mean(axis=0)
    components = np.linalg.svd(np.concatenate([audio, images]) - center, full_matrices=False)[2][:2]
    points = [(means - center) @ components.T for means in (audio, images)]
    for kind, *ends in zip(sorted(set(kinds)), *points, strict=True):
        axes.plot(*np.transpose(ends), color="gray", linewidth=0.5)
        axes.annotate(kind, ends[1], fontsize=7)
    for label, means, marker in zip(("audio", "images"), points, "s^", strict=True):
        axes.plot(*means.T, marker, label=f"mean of a kind, {label}", markersize=4)
    axes.set(xlabel="first principal component", ylabel="second")
    axes.legend(fontsize="small")
