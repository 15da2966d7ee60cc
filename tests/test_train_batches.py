"""The random choices for an example, and the properties that all rows of a batch share; records and media are fakes."""

import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from text_fixtures import SPELLING

from vllama_jax.config import tiny
from vllama_jax.data import pipeline
from vllama_jax.data.annotation import Annotation
from vllama_jax.data.config import DataConfig, DatasetConfig, TextConfig
from vllama_jax.data.pipeline import BatchReader, DecodedMedia
from vllama_jax.data.sampling import Rows, Stream
from vllama_jax.data.tokenization import extend_padding
from vllama_jax.errors import MediaError
from vllama_jax.media import frame_indices
from vllama_jax.media.augment import random_crop_box
from vllama_jax.train.config import TrainConfig

CONVERSATION = TextConfig(layout="conversation", max_length=2000)
INSTRUCTED = TextConfig(instructions=("One?", "Two?", "Three?"))
EVERY_LENGTH = DataConfig(length_buckets=tuple(range(1, 2000)), num_threads=1)
HEIGHT, WIDTH = 60, 80


class Records:
    """Records of one media type, one for each answer; all have the same image."""

    digest = "0123456789abcdef"

    def __init__(self, kind: str, answers: list[str]):
        self.kinds = {kind: range(len(answers))}
        self.annotations = [Annotation(f"{n}.{kind}", kind, (("What?", message),)) for n, message in enumerate(answers)]
        file = io.BytesIO()
        Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(file, "png")
        self.media = lambda number: file.getvalue()
        self.annotation = self.annotations.__getitem__

    def __len__(self) -> int:
        return len(self.annotations)


def stream_of(kind: str = "image", answers: tuple[str, ...] = ("a", "b"), **options) -> Stream:
    return Stream(DatasetConfig(path="d", **options), Records(kind, list(answers)), kind, 1.0)


def reader_of(rows: list[int], data: DataConfig = EVERY_LENGTH, **options) -> BatchReader:
    config = TrainConfig(model="m", datasets=(DatasetConfig(path="d"),), steps=1, batch_size=2, data=data, **options)
    return BatchReader(config.data, config.branch, config.seed, tiny(), SPELLING, None, rows)


# Random choices for an example


@pytest.fixture
def boxes(monkeypatch) -> list[tuple]:
    """Record the arguments and results of `random_crop_box`, in order."""
    calls = []

    def recorded(rng, *asked):
        calls.append((asked, random_crop_box(rng, *asked)))
        return calls[-1][1]

    monkeypatch.setattr(pipeline, "random_crop_box", recorded)
    return calls


def test_images_are_cropped_by_their_size_and_the_config(boxes):
    reader = reader_of([], DataConfig(min_crop_area=0.3, max_crop_aspect_ratio=2.0))
    assert reader.decode(stream_of(), 0, 0).media.shape == (1, 224, 224, 3)
    ((asked, box),) = boxes
    assert asked == (HEIGHT, WIDTH, (0.3, 1.0), (0.5, 2.0))
    assert box.top + box.height <= HEIGHT
    assert box.left + box.width <= WIDTH
    reader_of([], DataConfig(min_crop_area=1)).decode(stream_of(), 0, 0)
    assert len(boxes) == 1, "1 is no crop"


def test_crops_depend_only_on_seed_dataset_record_and_variant(boxes):
    stream, other = stream_of(), stream_of()
    other.records.digest = "1" * 16
    examples = [(42, stream, 0, 0), (7, stream, 0, 0), (42, other, 0, 0), (42, stream, 1, 0), (42, stream, 0, 1)]
    for seed, one, record, variant in examples * 2:
        reader_of([], seed=seed).decode(one, record, variant)
    given = [box for _, box in boxes]
    assert given[:5] == given[5:]
    assert len(set(given)) == 5


def chosen_by(monkeypatch, frames: str, total: int, record: int = 0, variant: int = 0) -> list[int]:
    """Return the sampled frames of a video of `total` frames."""
    asked = []

    def read(path, wanted, size, audio, sample_frames):
        asked.append(sample_frames(total, wanted).tolist())
        return SimpleNamespace(frames=np.zeros((wanted, 8, 8, 3), np.uint8), timestamps=np.arange(wanted))

    monkeypatch.setattr(pipeline, "read_video", read)
    monkeypatch.setattr(pipeline, "crop_frames", lambda frames, box, size: frames)
    reader_of([]).decode(stream_of("video", frame_sampling=frames), record, variant)
    return asked[0]


def test_frame_sampling_is_uniform_or_random_in_each_half(monkeypatch):
    assert chosen_by(monkeypatch, "uniform", 40) == frame_indices(40, 8).tolist()
    drawn = [chosen_by(monkeypatch, "head_tail", 40, *example) for example in [(0, 0), (1, 0), (0, 1), (0, 0)]]
    assert all(sum(frame < 20 for frame in one) == 4 for one in drawn)
    assert drawn[0] == drawn[3]
    assert len({tuple(one) for one in drawn}) == 3


@pytest.mark.parametrize("frames", [7, 8])
def test_a_video_of_fewer_frames_than_the_model_takes_is_not_used(monkeypatch, frames):
    found = SimpleNamespace(frames=np.zeros((frames, 224, 224, 3), np.uint8), timestamps=np.arange(frames) / 2)
    monkeypatch.setattr(pipeline, "read_video", lambda *_, **__: found)
    if frames == 8:
        assert reader_of([]).decode(stream_of("video"), 0, 0).timestamps == (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)
    else:
        with pytest.raises(MediaError, match=r"0\.video: too short, 7 frames of 8"):
            reader_of([]).decode(stream_of("video"), 0, 0)


# Shared by all rows


@pytest.fixture
def decoded(monkeypatch) -> dict[str, tuple[float, ...]]:
    """Replace decoding by media of zeros; `decoded["seconds"]` sets the timestamps of all videos."""
    given = {"seconds": ()}

    def decode_all(self, stream, examples):
        shape, dtype = self._media_shape(stream)
        names = [stream.records.annotation(record).id for record, _ in examples]
        return [DecodedMedia(name, np.zeros(shape, dtype), given["seconds"]) for name in names]

    monkeypatch.setattr(BatchReader, "decode_all", decode_all)
    return given


def test_rows_extended_to_the_longest_text_equal_those_of_one_host(decoded):
    rows = Rows(stream_of(answers=("a", "a much longer answer"), text=CONVERSATION), [(0, 0), (1, 0)])
    short, long, both = (reader_of(mine).read(rows).arrays for mine in ([0], [1], [0, 1]))
    (length,) = long["length"]
    assert short["ids"].shape[1] < length
    short = extend_padding(short, length)
    assert {arrays["ids"].shape[1] for arrays in (short, long, both)} == {length}
    assert short["length"][0] == length - len("a much longer answer") + len("a")
    for name, array in both.items():
        np.testing.assert_array_equal(array, np.concatenate([short[name], long[name]]))
        assert array.dtype == short[name].dtype


def test_video_batches_are_padded_for_the_longest_timestamps(decoded):
    """Timestamps are known only on the host that decodes a video; all hosts must agree on the length before."""
    rows = Rows(stream_of("video", text=CONVERSATION), [(0, 0), (1, 0)])
    found = {}
    for timestamps in (0.0, 9999.9):
        decoded["seconds"] = (timestamps,) * 8
        found[timestamps] = reader_of([0, 1]).read(rows).arrays
    assert found[0.0]["ids"].shape == found[9999.9]["ids"].shape
    assert found[9999.9]["length"].max() == found[9999.9]["ids"].shape[1]
    assert found[0.0]["length"].max() == found[0.0]["ids"].shape[1] - 8 * len("999")


def test_instructions_depend_only_on_epoch_and_record(decoded):
    stream = stream_of(answers=("a",) * 4, text=INSTRUCTED)

    def ids(examples):
        return [
            tuple(row) for row in reader_of(range(len(examples))).read(Rows(stream, examples)).arrays["ids"].tolist()
        ]

    by_epoch, by_record = ids([(0, epoch) for epoch in range(12)]), ids([(record, 0) for record in range(4)] * 2)
    assert len(set(by_epoch)) == 3
    assert by_record[:4] == by_record[4:]
    assert len(set(by_record)) > 1
    assert by_record[0] == by_epoch[0]


def test_a_row_without_media_or_labels_has_no_targets_and_a_reason(decoded, monkeypatch):
    short = TextConfig(layout="conversation", template="llama_2", max_length=60)  # 32 are media tokens
    batch = reader_of([0, 1]).read(Rows(stream_of(text=short), [(0, 0), (1, 0)]))
    assert batch.problems == dict.fromkeys((0, 1), "its text has no labels")
    assert (batch.arrays["targets"] == -1).all()
    assert batch.frames == 2
    broken = [
        DecodedMedia("0.image", None, problem="cut off"),
        DecodedMedia("1.image", np.ones((1, 224, 224, 3), np.uint8)),
    ]
    monkeypatch.setattr(BatchReader, "decode_all", lambda *_: broken)
    batch = reader_of([0, 1]).read(Rows(stream_of(text=CONVERSATION), [(0, 0), (1, 0)]))
    assert batch.problems == {0: "cut off"}
    assert (batch.arrays["targets"][0] == -1).all()
    assert (batch.arrays["targets"][1] >= 0).any()
    assert batch.arrays["frames"].sum(axis=(1, 2, 3, 4)).tolist() == [0, 224 * 224 * 3]
    assert batch.frames == 1


def test_audio_batches_have_no_frames(decoded):
    config = dataclasses.replace(tiny(), num_clips=3)
    reader = dataclasses.replace(reader_of([0, 1], branch="audio"), model=config)
    batch = reader.read(Rows(stream_of("audio", text=CONVERSATION), [(0, 0), (1, 0)]))
    assert batch.frames == 0
    assert batch.arrays["mel"].shape == (2, 3, 128, 204)
    assert batch.arrays["is_media"].sum(axis=1).tolist() == [8, 8]
