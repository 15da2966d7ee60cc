"""Files that another program replaces while they are read: the second reading finds no stream of the kind."""

import wave

import numpy as np
import pytest

from vllama_jax.errors import MediaError
from vllama_jax.media import write_video
from vllama_jax.media.audio_decoder import AudioDecoder
from vllama_jax.media.files import open_container, sound_stream
from vllama_jax.media.frames import _count_frames


@pytest.fixture
def audio_file(tmp_path):
    path = tmp_path / "audio.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(32000))
    return str(path)


def test_a_video_that_became_audio_is_one_error(audio_file):
    with pytest.raises(MediaError, match=r"audio\.wav: the file changed while it was read; read it again"):
        _count_frames(audio_file, [0], size=16)


def test_audio_that_became_a_silent_video_is_one_error(audio_file, tmp_path):
    video = tmp_path / "video.mp4"
    write_video(video, np.zeros((2, 16, 16, 3), np.uint8), fps=2)
    with open_container(audio_file) as container:
        decoder = AudioDecoder(container, sound_stream(container), str(video))
        with pytest.raises(MediaError, match=r"video\.mp4: the file changed while it was read; read it again"):
            decoder._repeat()
