"""The types of the public API, as type checkers and IDEs infer them. mypy reads this file; nothing runs it.

tests/test_types.py checks it outside of the checkout against the editable install; .ci/run checks it against a plain
one. An untyped or unknown name has type `Any`, which `assert_type` refuses.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import jax
import numpy as np

import vllama_jax as vl
from vllama_jax.chat import Answer
from vllama_jax.convert.rules import Rule, linear
from vllama_jax.embed import FileFeatures
from vllama_jax.text.tokenizer import Tokenizer


def load_a_model() -> vl.Model:
    model = vl.load(Path("MODEL"), dtype="bfloat16", mesh=vl.sharding.make_mesh(tensor=2), quantize=None)
    assert_type(model, vl.Model)
    assert_type(model.config, vl.VideoLlamaConfig)
    assert_type(model.tokenizer, Tokenizer)
    assert_type(model.network, vl.VideoLlama)
    return model


def talk_about_a_file(model: vl.Model) -> None:
    chat = vl.Chat(model, template=None)
    assert_type(chat.add("clip.mp4", num_frames=8), vl.MediaReport)
    with open("clip.mp4", "rb") as file:
        chat.add(file)
    chat.add(Path("clip.mp4").read_bytes())
    chat.add(["1.png", "2.png"])
    chat.add(vl.media.ImageFrames("frames", rate=25))
    chat.add(vl.media.VideoArrays(np.zeros((2, 8, 8, 3), np.uint8), [0.0, 0.5]), audio=False)
    chat.add("https://example.org/clip.mp4", allow_url=True)
    assert_type(chat.ask("What is the dog doing?", temperature=0.0), Iterator[str])
    assert_type(chat.last, Answer | None)
    assert_type(chat.files, tuple[vl.MediaReport, ...])
    assert_type(chat.undo(), str)


def embed_files(model: vl.Model) -> None:
    assert_type(vl.embed_files(model, ["clip.mp4"], features=("imagebind",)), Iterator[FileFeatures])
    assert_type(vl.embed.load_encoders("MODEL"), vl.Model)


def call_the_network(model: vl.Model, frames: jax.Array, mel: jax.Array) -> None:
    assert_type(model.network.encode_video(frames), jax.Array)
    assert_type(model.network.encode_audio(mel), jax.Array)
    assert_type(model.network.embed(frames), jax.Array)


def read_files() -> None:
    video = vl.media.read_video("clip.mp4", num_frames=8)
    assert_type(video, vl.media.Video)
    assert_type(video.frames, np.ndarray)
    assert_type(video.waveform, np.ndarray | None)
    assert_type(vl.media.read_segment("clip.mp4", 0.0, 1.0), vl.media.Video)
    assert_type(vl.media.read_audio("clip.wav"), vl.media.Audio)
    assert_type(vl.media.read_image("image.jpg"), np.ndarray)
    assert_type(vl.media.read_media("clip.mp4"), vl.media.Video | vl.media.Image | vl.media.Audio)
    assert_type(vl.media.normalize(video.frames), np.ndarray)


def other_modules() -> list[type[vl.VllamaError]]:
    assert_type(vl.config.tiny(), vl.VideoLlamaConfig)
    assert_type(vl.GenerationConfig().max_new_tokens, int)
    assert_type(vl.generate.padded_prompt_length(3), int)
    assert_type(linear("llama_proj", "llama_proj"), list[Rule])
    assert_type(vl.__version__, str)
    assert_type(vl.MediaError("why"), vl.MediaError)
    return [vl.ArrayError, vl.CheckpointError, vl.ConfigError, vl.DataError, vl.MediaError]
