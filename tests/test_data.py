"""Published layouts and one's own → records → rows, without TensorFlow; and what is said where they are wrong."""

import json
import subprocess
import sys
from pathlib import Path

import media_fixtures
import numpy as np
import pytest
from PIL import Image

from vllama_jax.cli import main
from vllama_jax.data.build import build
from vllama_jax.data.records import Annotation, open_records
from vllama_jax.data.sources import SOURCES
from vllama_jax.errors import CheckpointError, DataError


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A video of 12 frames, one of 4, a picture and a sound."""
    folder = tmp_path_factory.mktemp("files")
    media_fixtures.write_video(folder / "long.mp4", num_frames=12)
    media_fixtures.write_video(folder / "short.mp4", num_frames=4)
    media_fixtures.write_video(folder / "sound.mp4", num_frames=12, sound=media_fixtures.tone(1, 16000))
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(folder / "picture.jpg")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lay(folder: Path, contents: dict[str, object]) -> Path:
    """A folder of these files; what is no bytes or text is written as JSON."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def read(name: str, source: Path, out: Path) -> list[Annotation]:
    build(name, source, out)
    records = open_records(out)
    return [records.annotation(number) for number in range(len(records))]


def test_webvid(files, tmp_path):
    table = 'videoid,page_dir,name\n7,a_b,"A dog, running"\n8,a_b,Gone\n'
    source = lay(tmp_path / "source", {"annotations/0.csv": table, "videos/a_b/7.mp4": files["long.mp4"]})
    assert read("webvid", source, tmp_path / "out") == [Annotation("a_b/7.mp4", "video", (("", "A dog, running"),))]
    (skipped,) = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["id"] == "a_b/8.mp4"
    assert "no such file" in json.loads(skipped)["why"]
    assert open_records(tmp_path / "out").media(0) == files["long.mp4"]


@pytest.mark.parametrize("name", ["llava_cc3m", "minigpt4"])
def test_captions(files, tmp_path, name):
    annotations = {"annotations": [{"image_id": "12", "caption": "A wall."}]}
    source = lay(tmp_path / "source", {"filter_cap.json": annotations, "image/12.jpg": files["picture.jpg"]})
    assert read(name, source, tmp_path / "out") == [Annotation("12.jpg", "image", (("", "A wall."),))]


def test_llava_instruct(files, tmp_path):
    turns = [("human", "What is it?\n<image>"), ("gpt", "A wall."), ("human", "Old?"), ("gpt", "Yes.")]
    entry = {"image": "1.jpg", "conversations": [{"from": who, "value": said} for who, said in turns]}
    bare = {"image": "1.jpg", "conversations": entry["conversations"][2:]}
    source = lay(
        tmp_path / "source",
        {"llava_instruct_150k.json": [entry, bare], "train2014/COCO_train2014_1.jpg": files["picture.jpg"]},
    )
    first, second = read("llava_instruct", source, tmp_path / "out")
    assert first.turns == (("What is it?\n", "A wall."), ("Old?", "Yes."))
    assert first.media_at == len("What is it?\n")
    assert second == Annotation("COCO_train2014_1.jpg", "image", ((" Old?", "Yes."),))


def test_videochat(files, tmp_path):
    entry = {"video": "1.mp4", "QA": [{"i": "Describe.", "q": "What?", "a": "A dog."}, {"q": "Where?", "a": "Here."}]}
    source = lay(tmp_path / "source", {"videochat_instruct_11k.json": [entry], "videos/1.mp4": files["long.mp4"]})
    (found,) = read("videochat", source, tmp_path / "out")
    assert found == Annotation("1.mp4", "video", (("What?", "A dog."), ("Where?", "Here.")))


OWN = [
    {"audio": "sound.mp4", "caption": "a tone"},
    {
        "image": "picture.jpg",
        "messages": [{"role": "user", "content": "<image>\nHm?"}, {"role": "assistant", "content": "A."}],
    },
    {
        "video": "long.mp4",
        "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "B."}],
    },
    {"video": "long.mp4", "question": "Why?", "answer": "C."},
]


def own(tmp_path: Path, files: dict[str, bytes], lines=OWN) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return lay(tmp_path / "source", {"mine.jsonl": text, **files})


def test_ones_own_in_the_order_of_kinds(files, tmp_path):
    found = read("jsonl", own(tmp_path, files), tmp_path / "out")
    assert [(one.kind, one.turns, one.media_at) for one in found] == [
        ("video", (("What?", "B."),), 0),
        ("video", (("Why?", "C."),), 0),
        ("image", (("\nHm?", "A."),), 0),
        ("audio", (("", "a tone"),), 0),
    ]
    records = open_records(tmp_path / "out")
    assert {kind: list(numbers) for kind, numbers in records.kinds.items()} == {
        "video": [0, 1],
        "image": [2],
        "audio": [3],
    }
    assert records.media(3) == files["sound.mp4"]


def test_records_are_read_without_tensorflow(files, tmp_path):
    build("jsonl", own(tmp_path, files), tmp_path / "out")
    code = (
        "import sys; from vllama_jax.data.records import open_records; "
        f"records = open_records({str(tmp_path / 'out')!r}); records.annotation(0); records.media(0); "
        "sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"line 2: not JSON"),
        ({"caption": "a dog"}, r"line 2: it must name one file; a line has one of video"),
        ({"video": "long.mp4"}, r"line 2: it says nothing of its file"),
    ],
)
def test_a_line_that_is_not_understood_is_named(files, tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        build("jsonl", own(tmp_path, files, [OWN[0], line]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "jsonl"])
def test_a_wrong_layout_says_what_is_expected(tmp_path, name):
    (tmp_path / "source").mkdir()
    with pytest.raises(DataError, match="expected there"):
        build(name, tmp_path / "source", tmp_path / "out")


def test_nothing_usable_is_an_error(tmp_path):
    source = lay(tmp_path / "source", {"mine.jsonl": json.dumps({"video": "gone.mp4", "caption": "a dog"}) + "\n"})
    with pytest.raises(DataError, match=r"none of its 1 annotations can be used; the first: gone.mp4: .*no such file"):
        build("jsonl", source, tmp_path / "out")


def test_an_existing_directory_is_not_overwritten(files, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        build("jsonl", own(tmp_path, files), tmp_path / "out")


def test_records_of_another_version_and_other_directories(files, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no such records directory"):
        open_records(out)
    build("jsonl", own(tmp_path, files), out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(DataError, match="records of format 2, this version reads 1; build them again"):
        open_records(out)
    (out / "manifest.json").write_text(json.dumps({**manifest, "kinds": {"video": 9}}))
    with pytest.raises(DataError, match=r"not as many records as manifest\.json says"):
        open_records(out)


def test_check_lists_what_cannot_be_used(files, tmp_path, capsys):
    broken = {"broken.mp4": files["long.mp4"][:600]}
    lines = [*OWN, {"video": "short.mp4", "caption": "x"}, {"video": "broken.mp4", "caption": "x"}]
    build("jsonl", own(tmp_path, {**files, **broken}, lines), tmp_path / "out")
    with pytest.raises(SystemExit, match="2 of 6 records cannot be used"):
        main(["data", "check", str(tmp_path / "out"), "--json"])
    problems = {found["id"]: found["why"] for found in json.loads(capsys.readouterr().out)["problems"]}
    assert problems["short.mp4"] == "too short, 4 frames of 8"
    assert "truncated" in problems["broken.mp4"]


def test_check_counts_tokens_and_stats_tell_of_kinds(files, tmp_path, capsys, tiny_model):
    build("jsonl", own(tmp_path, files), tmp_path / "out")
    main(["data", "check", str(tmp_path / "out"), "--model", str(tiny_model)])
    assert "tokens: " in capsys.readouterr().out
    main(["data", "stats", str(tmp_path / "out"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {kind: one["records"] for kind, one in found.items()} == {"video": 2, "image": 1, "audio": 1}
    assert found["video"]["files"] == 1


def test_the_command(files, tmp_path):
    source = own(tmp_path, files)
    command = [str(Path(sys.executable).with_name("vllama")), "data", "build", "jsonl"]
    done = subprocess.run(
        [*command, "--source", str(source), "--out", str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert "2 video, 1 image, 1 audio records" in done.stdout
    assert len(open_records(tmp_path / "out")) == 4
