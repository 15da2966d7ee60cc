"""Media for training: media in memory, frame sampling, random crops."""

import math
import os

import numpy as np
import pytest
import torch
from media_fixtures import decode_frame_numbers, write_video
from PIL import Image as pillow

from vllama_jax.errors import MediaError
from vllama_jax.media import as_file, frame_indices, read_image, read_media, read_video
from vllama_jax.media.augment import CropBox, crop_frames, head_tail_indices, random_crop_box
from vllama_jax.media.image import resize

SCALE, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)


# ------------------------------------------------------------------------------------------------ media in memory


@pytest.fixture(params=["in memory", "on disk"])
def either_kind(request, monkeypatch, tmp_path):
    """Test in-memory files, which Linux has, and the temporary files that other systems use."""
    if request.param == "on disk":
        monkeypatch.delattr(os, "memfd_create")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.usefixtures("either_kind")
def test_media_in_memory_are_read_like_files(clip, tmp_path):
    pillow.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "red.png")
    with as_file(clip.read_bytes()) as path:
        reread = read_video(path, num_frames=4, size=64)
        kind = read_media(path).report.kind
    expected = read_video(clip, num_frames=4, size=64)
    assert (reread.frames == expected.frames).all()
    assert (reread.waveform == expected.waveform).all()
    assert kind == "video"
    assert not os.path.exists(path)
    with as_file((tmp_path / "red.png").read_bytes()) as path:
        assert (read_image(path, size=8) == [255, 0, 0]).all()
    assert not os.path.exists(path)


def test_several_media_in_memory_at_once(clip, tmp_path):
    pillow.new("L", (4, 4)).save(tmp_path / "black.png")
    with as_file(clip.read_bytes()) as video, as_file((tmp_path / "black.png").read_bytes()) as image:
        assert video != image
        assert read_image(image, size=8).max() == 0
        assert len(read_video(video, size=64).frames) == 8


@pytest.mark.usefixtures("either_kind")
def test_bytes_that_are_no_media(clip):
    cut = clip.read_bytes()[:900]
    with pytest.raises(MediaError, match=r"^media in memory: the file is empty"), as_file(b""):
        pass
    with pytest.raises(MediaError, match=r"^record 7: the mp4 is truncated"), as_file(cut, "record 7") as path:
        read_video(path)
    with pytest.raises(MediaError, match=r"^media in memory: not a video"), as_file(b"text") as path:
        read_media(path)
    assert not os.path.exists(path)
    with pytest.raises(KeyError), as_file(b"text") as path:
        raise KeyError
    assert not os.path.exists(path)


# ------------------------------------------------------------------------------------------------ frame sampling


def test_a_custom_sample_function_chooses_the_frames(tmp_path):
    path = write_video(tmp_path / "clip.mp4")
    video = read_video(
        path, num_frames=3, size=64, sample_frames=lambda total, count: np.array([total - count, 148, 149])
    )
    assert decode_frame_numbers(video.frames) == [147, 148, 149]
    assert video.timestamps.tolist() == [147 / 25, 148 / 25, 149 / 25]
    assert video.report.num_frames == 3


def test_frames_are_sampled_again_after_a_wrong_declared_count(tmp_path):
    """A recording that starts between key frames has packets without a decodable frame."""
    full = write_video(tmp_path / "whole.ts").read_bytes()
    (tmp_path / "late.ts").write_bytes(full[len(full) // 3 // 188 * 188 :])  # a transport stream has 188-byte packets
    frame_counts = []

    def sample_frames(total, num_frames):
        frame_counts.append(total)
        return frame_indices(total, num_frames)

    video = read_video(tmp_path / "late.ts", size=64, sample_frames=sample_frames)
    assert len(frame_counts) == 2
    assert frame_counts[1] < frame_counts[0]
    assert (video.timestamps * 25).round().tolist() == frame_indices(frame_counts[1], 8).tolist()
    assert (video.frames == read_video(tmp_path / "late.ts", size=64).frames).all()


def test_head_tail_indices():
    rng = np.random.default_rng(0)
    counts = np.zeros(20)
    for _ in range(2000):
        indices = head_tail_indices(20, 8, rng)
        assert (np.diff(indices) > 0).all()
        assert (indices < 10).sum() == 4
        counts[indices] += 1
    assert np.abs(counts / 2000 - 0.4).max() < 0.05


@pytest.mark.parametrize(("total", "num_frames"), [(9, 8), (8, 8), (7, 8), (0, 8), (9, 5), (6, 5), (2, 1), (30, 1)])
def test_head_tail_indices_of_short_videos(total, num_frames):
    for seed in range(20):
        indices = head_tail_indices(total, num_frames, np.random.default_rng(seed))
        assert indices.dtype == np.int64
        assert len(set(indices.tolist())) == len(indices) == min(total, num_frames)
        assert indices.tolist() == sorted(indices.tolist())
        assert (indices < total).all()
        if num_frames < total:
            assert (indices < total // 2).sum() == num_frames // 2


# ------------------------------------------------------------------------------------------------ crops


def test_crop_boxes_are_uniform_in_area_and_log_aspect_ratio():
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(rng, 1000, 1000, SCALE, RATIO) for _ in range(5000)])
    top, left, height, width = boxes.T
    assert ((top >= 0) & (left >= 0) & (top + height <= 1000) & (left + width <= 1000)).all()
    area, ratio = height * width / 1e6, np.log(width / height)
    assert (area.min(), area.max()) == pytest.approx(SCALE, abs=0.02)
    assert (ratio.min(), ratio.max()) == pytest.approx((math.log(RATIO[0]), math.log(RATIO[1])), abs=0.02)
    fits = area < 0.7  # boxes of more than 3/4 of the area do not fit at every aspect ratio, and are drawn again
    assert np.histogram(area[fits], 4, (0.5, 0.7))[0] / fits.sum() == pytest.approx(0.25, abs=0.03)
    assert np.histogram(ratio[fits], 4, np.log(RATIO))[0] / fits.sum() == pytest.approx(0.25, abs=0.03)
    assert top.min() == left.min() == 0
    assert (top / (1000 - height + 1)).mean() == pytest.approx(0.5, abs=0.02)
    assert (left / (1000 - width + 1)).mean() == pytest.approx(0.5, abs=0.02)


def test_aspect_ratio_is_width_over_height():
    """Aspect ratios are symmetric around one, so an inverted ratio would pass the test above."""
    boxes = np.array([random_crop_box(np.random.default_rng(seed), 100, 300, (0.1, 0.2), (2, 3)) for seed in range(50)])
    assert (np.round(boxes[:, 3] / boxes[:, 2], 1) >= 2).all()
    assert (np.round(boxes[:, 3] / boxes[:, 2], 1) <= 3).all()


def test_crop_boxes_depend_only_on_the_generator():
    first, second = (
        [random_crop_box(np.random.default_rng(seed), 60, 90, SCALE, RATIO) for seed in range(9)] for _ in "ab"
    )
    assert first == second
    assert len(set(first)) == 9


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (100, 1000, CropBox(0, 433, 100, 133)),  # as wide as the ratio allows
        (1000, 100, CropBox(433, 0, 133, 100)),
        (1, 1, CropBox(0, 0, 1, 1)),
    ],
)
def test_a_crop_that_never_fits_is_centered(height, width, expected):
    box = random_crop_box(np.random.default_rng(0), height, width, (1.0, 1.0), RATIO)
    assert box == expected
    assert all(type(side) is int for side in box)


def torch_crop(frames, box, size):
    """Crop as the original does, before its cast to integers."""
    top, left, height, width = box
    cropped = torch.from_numpy(frames[:, top : top + height, left : left + width]).permute(3, 0, 1, 2).float()
    stretched = torch.nn.functional.interpolate(cropped, size=(size, size), mode="bicubic", align_corners=False)
    return stretched.permute(1, 2, 3, 0).numpy()


def assert_cut_off(cropped, exact):
    """Check equality with the truncated values; they may differ by one where an exact value is close to an integer."""
    expected = np.clip(exact, 0, 255).astype(np.uint8)
    near_whole = np.abs(exact - np.round(exact)) < 1e-3
    assert cropped.dtype == np.uint8
    assert (cropped == expected)[~near_whole].all()
    assert np.abs(cropped.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [224, 32, 1])
def test_crops_equal_torch(size):
    rng = np.random.default_rng(0)
    for _ in range(5):
        height, width = rng.integers(1, 300, 2)
        frames = rng.integers(0, 256, (2, height, width, 3), np.uint8)  # noise overshoots the value range often
        box = random_crop_box(rng, int(height), int(width), SCALE, RATIO)
        cropped = crop_frames(frames, box, size)
        assert cropped.shape == (2, size, size, 3)
        assert cropped.flags.c_contiguous
        assert_cut_off(cropped, torch_crop(frames, box, size))


def test_a_crop_of_the_full_frame_changes_nothing():
    frames = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    assert (crop_frames(frames, (0, 0, 224, 224)) == frames).all()


def test_overshoots_are_clamped():
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    frames[:, :, 4:] = 255
    cropped = crop_frames(frames, (0, 0, 8, 8), 64)
    assert (np.diff(cropped[0, 0, :, 0].astype(int)) >= -6).all()  # overshoots are clamped, not wrapped around
    assert cropped[0, 0, 0, 0] == 0
    assert cropped[0, 0, -1, 0] >= 254


def test_crop_equals_the_golden_values(golden):
    """Compare where the original's values do not wrap around."""
    recorded = np.load(golden / "media/train_crop.npz")
    frames = np.load(golden / "media/birthday_video.npz")["frames_uint8_thwc"][:2]
    box = CropBox(*recorded["box_ijhw"].tolist())
    cropped, expected = crop_frames(frames, box), recorded["cropped_uint8_thwc"]
    exact = torch_crop(frames, box, 224)
    assert np.abs(exact - recorded["cropped_float_cthw"].transpose(1, 2, 3, 0)).max() < 0.13  # float16 of up to 255
    inside = (exact >= 0) & (exact < 256)
    assert (~inside).sum() == recorded["n_negative"] + recorded["n_over"]
    assert (np.abs(cropped[inside].astype(int) - expected[inside]) <= 1).all()
    assert (cropped[inside] == expected[inside]).mean() > 0.995
    assert set(cropped[~inside].tolist()) == {0, 255}
    assert_cut_off(cropped, exact)


def test_images_are_cropped_to_the_chosen_box(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    pillow.fromarray(pixels).save(tmp_path / "noise.png")
    frame_counts = []

    def choose_box(height, width):
        frame_counts.append((height, width))
        return 10, 20, 30, 40

    cropped = read_image(tmp_path / "noise.png", 32, choose_box)
    expected = resize(pillow.fromarray(pixels[10:40, 20:60]), (32, 32), pillow.Resampling.BICUBIC)
    assert frame_counts == [(60, 90)]
    assert (cropped == np.asarray(expected)).all()
    full = read_image(tmp_path / "noise.png", 32, lambda height, width: (0, 0, height, width))
    assert (full == read_image(tmp_path / "noise.png", 32)).all()
