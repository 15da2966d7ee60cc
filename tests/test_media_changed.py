"""Files that another program replaces while they are read: the second pass finds no stream of that type."""

import wave

import numpy as np
import pytest

from vllama_jax.errors import MediaError
from vllama_jax.media import write_video
from vllama_jax.media.audio_decoder import AudioDecoder
from vllama_jax.media.files import find_audio_stream, open_container
from vllama_jax.media.frames import _decode_from_start


@pytest.fixture
def audio_file(tmp_path):
    path = tmp_path / "audio.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(32000))
    return str(path)


def test_a_video_replaced_by_audio_is_a_one_line_error(audio_file):
    with pytest.raises(MediaError, match=r"audio\.wav: the file changed while it was read; read it again"):
        _decode_from_start(audio_file, [0], size=16)


def test_audio_replaced_by_a_silent_video_is_a_one_line_error(audio_file, tmp_path):
    video = tmp_path / "video.mp4"
    write_video(video, np.zeros((2, 16, 16, 3), np.uint8), fps=2)
    with open_container(audio_file) as container:
        decoder = AudioDecoder(container, find_audio_stream(container), str(video))
        with pytest.raises(MediaError, match=r"video\.mp4: the file changed while it was read; read it again"):
            decoder._decode_again()
