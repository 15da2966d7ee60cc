"""`vllama plot` of a media file: the log-mel spectrograms that the audio branch receives."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.io.wavfile
from test_cli import expect_error

from vllama_jax import cli
from vllama_jax.media.mel import mel_clips
from vllama_jax.media.plots import plot_mel


def write_tone(path, seconds: float):
    times = np.arange(round(seconds * 16000)) / 16000
    samples = (np.sin(2 * np.pi * 440 * times) * 2**14).astype(np.int16)
    scipy.io.wavfile.write(path, 16000, samples)
    return path


def test_each_clip_is_plotted_as_the_model_receives_it(tmp_path):
    file = write_tone(tmp_path / "tone.wav", 6)
    figure, audio = plot_mel(file, num_clips=3)
    *clips, unused, bar = figure.axes
    samples = scipy.io.wavfile.read(file)[1].astype(np.float32)[None] / 2**15
    for place, expected in zip(clips, mel_clips(samples, 16000, 3), strict=True):
        drawn = np.asarray(place.collections[0].get_array()).reshape(128, 204)
        np.testing.assert_allclose(drawn, expected, atol=1e-4)
    assert [place.get_title() for place in clips] == ["0.0 s to 2.0 s", "1.3 s to 3.3 s", "2.7 s to 4.7 s"]
    assert not unused.axison
    assert bar.get_ylabel() == "log-mel, normalized"
    assert audio.report.duration == 6


def test_a_tone_is_plotted_at_its_frequency(tmp_path):
    figure, _ = plot_mel(write_tone(tmp_path / "tone.wav", 3))
    drawn = figure.axes[0].collections[0]
    values, hertz = drawn.get_array().reshape(128, 204), drawn.get_coordinates()[:, 0, 1]
    loudest = int(values[:, 50].argmax())
    assert hertz[loudest] - 20 < 440 < hertz[loudest + 1] + 20


@pytest.mark.slow
def test_plot_of_a_file_writes_a_png_beside_it(tmp_path, capsys):
    file = write_tone(tmp_path / "tone.wav", 3)
    cli.main(["plot", str(file)])
    assert capsys.readouterr().out == f"{file}.mel.png: 8 clips of 3.0 s of audio; audio used\n"
    assert (tmp_path / "tone.wav.mel.png").read_bytes().startswith(b"\x89PNG")
    assert "an image, which has no audio" in expect_error(capsys, "plot", tmp_path / "tone.wav.mel.png")


def test_mel_clips_need_no_librosa():
    """Importing librosa takes longer than reading most files."""
    code = "import sys, numpy as np; from vllama_jax import media; media.mel_clips(np.zeros((1, 44100), 'f4'), 44100)"
    code += "; print({'librosa', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
