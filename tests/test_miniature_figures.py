"""The figures of the miniature: attention, results and losses."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from vllama_jax.config import tiny
from vllama_jax.errors import DataError
from vllama_jax.miniature import attention_plots, figures
from vllama_jax.miniature.evaluate import measure

CONFIG = tiny()
FRAMES, CLIPS = 3, 2


@pytest.fixture(scope="module")
def mel() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((CLIPS, 128, 204), np.float32)


@pytest.mark.slow
def test_attention_is_drawn_without_a_display(tmp_path, mel):
    frames, weights = np.full((FRAMES, 64, 64, 3), 200, np.uint8), np.zeros((FRAMES, 8, 8))
    weights[0, :4] = 1 / 32
    image_maps = attention_plots.plot_over_frames(frames, weights)
    audio_maps = attention_plots.plot_over_mels(
        mel, np.random.default_rng(0).random((CLIPS, 12, 19)), CONFIG.imagebind.audio
    )
    bars = Figure()
    shares = bars.subplots()
    attention_plots.plot_attention_shares(shares, np.array([0.5, 0.25, 0.25]), "frame")
    for number, figure in enumerate((image_maps, audio_maps, bars)):
        figure.savefig(tmp_path / f"{number}.png")
    read, not_read = (axes.images[1].get_array()[..., 3] for axes in image_maps.axes[FRAMES : FRAMES + 2])
    assert read[0, 0] == 0  # attended patches keep their brightness
    assert read[7, 0] > 0.5
    assert (not_read > 0.5).all()  # in other frames, none do
    assert [(axes.get_xlim(), axes.get_ylim()) for axes in audio_maps.axes[CLIPS:]] == [((0, 204), (0, 128))] * CLIPS
    assert [bar.get_height() for bar in shares.patches] == [0.5, 0.25, 0.25]


def results(right: int) -> dict:
    names = ("motion", "sound_only", "sound_order", "sound_only_new_wording", "sound_only_at_-5_db")
    names += ("sound_only_times_20", "sound_only_times_2", "sound_order_times_20", "sound_only_at_20_db")
    return {"seed": 0, "minutes": 1.0, "measures": {n: measure([True] * right + [False] * 10, 0.25) for n in names}}


@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_of_one_seed_and_of_several(tmp_path, seeds):
    given = [results(10 + seed) for seed in range(seeds)]
    (tmp_path / "results.json").write_text(json.dumps(given if seeds > 1 else given[0]))
    measures = figures.read_results(tmp_path / "results.json")
    assert len(measures) == seeds
    assert figures.list_variants(measures[0], "sound_only", "scale") == {
        1: "sound_only",
        2: "sound_only_times_2",
        20: "sound_only_times_20",
    }
    noises = {-5: "sound_only_at_-5_db", 20: "sound_only_at_20_db"}
    assert figures.list_variants(measures[0], "sound_only", "noise") == noises
    drawn = figures.plot_accuracies(measures)
    labels = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert labels == ["motion", "sound_only", "sound_order", "sound_only_new_wording"]
    mean = np.mean([one["motion"]["accuracy"] for one in measures])
    assert drawn.axes[0].patches[0].get_width() == pytest.approx(mean)
    for number, figure in enumerate((drawn, figures.plot_scale_sweep(measures), figures.plot_noise_sweep(measures))):
        figure.savefig(tmp_path / f"{number}.png")


def test_results_are_formatted_as_a_table():
    one, three = ([results(10 + seed)["measures"] for seed in range(count)] for count in (1, 3))
    assert "| `motion` | 0.500 | 0.299 to 0.701 | 0.250 |" in figures.format_results(one)
    assert "| `motion` | 0.523 | 0.500 to 0.545 | 0.500 | 0.299 to 0.701 | 0.250 |" in figures.format_results(three)


def test_measures_that_other_seeds_lack_have_no_mean_and_no_bar():
    older, newer = (results(10 + seed)["measures"] for seed in range(2))
    newer["hear_nothing"] = newer["motion"]
    assert "| `hear_nothing` | – | – | 0.524 | 0.324 to 0.717 | 0.250 |" in figures.format_results([newer, older])
    for seeds in ([newer, older], [older, newer]):
        labels = [label.get_text() for label in figures.plot_accuracies(seeds).axes[0].get_yticklabels()]
        assert labels == ["motion", "sound_only", "sound_order", "sound_only_new_wording"]


def test_an_invalid_results_file_is_an_error(tmp_path):
    for name, text in (("none.json", None), ("broken.json", "{"), ("other.json", '{"seed": 0}')):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=f"{name}: not a results file of a miniature"):
            figures.read_results(tmp_path / name)


def test_losses_of_runs_are_plotted(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "loss": 1 / step, "lr": 1e-3}) for step in range(1, 9)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "lo')
    figure = figures.plot_losses({name: tmp_path / name for name in ("one", "two")})
    figure.savefig(tmp_path / "losses.png")
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [8] * 4
    with pytest.raises(DataError, match="no such file"):
        figures.plot_losses({"none": tmp_path})
