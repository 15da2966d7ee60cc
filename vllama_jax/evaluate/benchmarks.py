"""Readers of the published annotation files of benchmarks, one function for each benchmark.

A reader takes the path that the user gives, and returns questions. Unknown fields are ignored. A file that is not the
published one raises DataError with the location of the difference. So does a single entry that cannot be used, because
scores over fewer questions would be misleading.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from vllama_jax.errors import ConfigError, DataError, format_error
from vllama_jax.evaluate.annotations import (
    AnnotationEntry,
    add_location_to_errors,
    find_annotation_file,
    find_json_tables,
    get_name,
    get_time_range,
    iterate_entries,
    read_annotation_object,
    read_entries,
    read_text,
    read_youtube_mapping,
)
from vllama_jax.evaluate.questions import (
    Question,
    make_caption_question,
    make_choice_question,
    make_open_question,
)
from vllama_jax.io.json_files import parse_json
from vllama_jax.io.paths import read_first_bytes
from vllama_jax.runtime.extras import import_extra

BenchmarkName = Literal[
    "msvd_qa",
    "msrvtt_qa",
    "activitynet_qa",
    "video_chatgpt",
    "mvbench",
    "video_mme",
    "msrvtt_captions",
    "msvd_captions",
    "vatex_captions",
    "coco_captions",
    "jsonl",
]

QUESTION_WORDS = ("what", "who", "how", "when", "where")  # the question types of MSVD-QA and MSRVTT-QA
ACTIVITYNET_QUESTION_TYPES = (  # MILVLG/activitynet-qa, dataset/README.md
    "motion",
    "spatial relation",
    "temporal relation",
    "yes/no",
    "colour",  # British: saved results and digests have this spelling
    "object",
    "location",
    "number",
    "other",
)
GENERIC_ASPECTS = ("correctness", "detail", "context")
TVQA_FRAME_RATE = 3.0  # MVBench has TVQA's videos as images, three per second
MVBENCH_FOLDERS = {  # task → directory of its videos in the archives of OpenGVLab/MVBench
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
JSONL_HELP = "a line has video, and question and answer (optionally choices), or captions"


def read_msvd_qa(path: Path) -> list[Question]:
    """Read test_qa.json. video_id 1301 is vid1301, which youtube_mapping.txt next to it maps to MSVD's own name."""
    path = find_annotation_file(path, "test_qa.json", "test_q.json")
    mapping = read_youtube_mapping(path.parent / "youtube_mapping.txt")

    def names(video: str) -> tuple[str, ...]:
        name = f"vid{video}" if video.isdigit() else video
        return (name, *mapping.get(name, ()))

    return _read_question_answers(path, names, _classify_by_first_word)


def read_msrvtt_qa(path: Path) -> list[Question]:
    """Read test_qa.json. video_id 7010 is video7010."""
    path = find_annotation_file(path, "test_qa.json", "test_q.json")
    return _read_question_answers(
        path, lambda video: (f"video{video}" if video.isdigit() else video,), _classify_by_first_word
    )


def read_activitynet_qa(path: Path) -> list[Question]:
    """Read test_q.json, and test_a.json next to it. The video of video_name is v_NAME in ActivityNet."""

    def names(video: str) -> tuple[str, ...]:
        youtube_id = video.removeprefix("v_") if len(video) == 13 else video  # YouTube ids have 11 characters
        return (f"v_{youtube_id}", youtube_id)

    def category(entry: dict[str, Any]) -> str:
        number = entry.get("type")
        if isinstance(number, int) and 0 <= number < len(ACTIVITYNET_QUESTION_TYPES):
            return ACTIVITYNET_QUESTION_TYPES[number]
        return "other"

    return _read_question_answers(find_annotation_file(path, "test_q.json"), names, category)


def read_video_chatgpt(path: Path) -> list[Question]:
    """Read generic_qa.json, temporal_qa.json and consistency_qa.json from a directory, or one of them.

    Answers to the first are judged for three aspects. The last has two versions of each question (Q1, Q2).
    """
    stems = ("generic_qa", "temporal_qa", "consistency_qa")
    return [question for table in find_json_tables(path, stems) for question in _read_video_chatgpt_table(table)]


def _read_video_chatgpt_table(table: Path) -> Iterator[Question]:
    aspects = {"generic_qa": GENERIC_ASPECTS, "temporal_qa": ("temporal",), "consistency_qa": ("consistency",)}
    fields = ("Q1", "Q2") if table.stem == "consistency_qa" else ("Q",)
    for number, (location, entry) in enumerate(read_entries(table)):
        with add_location_to_errors(location):
            video, key = get_name(entry, "video_name"), f"{table.stem}-{number}"
            for field in fields:
                yield make_open_question(
                    entry.get(field),
                    entry.get("A"),
                    aspects[table.stem],
                    id=key if len(fields) == 1 else f"{key}-{field}",
                    names=(video,),
                    categories=(table.stem.removesuffix("_qa"),),
                    group=key,
                )


def read_mvbench(path: Path) -> list[Question]:
    """Read the JSON files of the 20 tasks from a directory, or one of them."""
    folder = path / "json" if (path / "json").is_dir() else path
    return [question for table in find_json_tables(folder, MVBENCH_FOLDERS) for question in _read_mvbench_table(table)]


def _read_mvbench_table(table: Path) -> Iterator[Question]:
    folder = MVBENCH_FOLDERS[table.stem]
    for number, (location, entry) in enumerate(read_entries(table)):
        with add_location_to_errors(location):
            video = get_name(entry, "video")
            yield make_choice_question(
                entry.get("question"),
                entry.get("candidates"),
                entry.get("answer"),
                id=f"{table.stem}-{number}",
                names=(f"{folder}/{video}",),  # file names are not unique over its datasets
                categories=(table.stem,),
                frame_rate=TVQA_FRAME_RATE if "frames" in folder else None,
                **get_time_range(entry),
            )


def read_video_mme(path: Path) -> list[Question]:
    """Read the Parquet file of lmms-lab/Video-MME, or JSON in the layout of results in the authors' repository."""
    folder = path / "videomme" if (path / "videomme").is_dir() else path
    if folder.is_dir():
        found = sorted([*folder.glob("*.parquet"), *folder.glob("*.json")])
        if len(found) != 1:
            raise DataError(f"{folder}: {len(found)} Parquet and JSON files in it; give the file with the questions")
        folder = found[0]
    questions = []
    for location, entry in _read_video_mme_entries(folder):
        with add_location_to_errors(location):
            length = get_name(entry, "duration", "duration_category")
            youtube = str(entry.get("url") or "").rsplit("v=", 1)[-1]
            names = [entry.get("videoID"), youtube, entry.get("video_id")]
            questions.append(
                make_choice_question(
                    entry.get("question"),
                    entry.get("options", entry.get("choices")),
                    entry.get("answer"),
                    id=get_name(entry, "question_id"),
                    names=tuple(dict.fromkeys(str(name) for name in names if name)),
                    categories=(length, get_name(entry, "task_type")),
                )
            )
    return questions


def _read_video_mme_entries(table: Path) -> Iterator[AnnotationEntry]:
    if read_first_bytes(table, DataError, 4) != b"PAR1":
        for location, video in read_entries(table):
            if not isinstance(video.get("questions"), list):
                yield location, video
                continue
            for entry in video["questions"]:
                yield location, video | (entry if isinstance(entry, dict) else {})
        return
    parquet = import_extra("pyarrow.parquet", "eval", f"{table}: reading Parquet", ConfigError)
    try:
        rows = parquet.read_table(table).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{table}: the Parquet file cannot be read ({format_error(error)}); download it again"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{table}, row {number}", row


def read_msrvtt_captions(path: Path) -> list[Question]:
    """Read the test split of test_videodatainfo.json or MSRVTT_data.json, which list videos and sentences."""
    path = find_annotation_file(path, "test_videodatainfo.json", "MSRVTT_data.json")
    found = read_annotation_object(path, "videos", "sentences")
    splits = {entry.get("video_id"): entry.get("split") for _, entry in iterate_entries(path, found["videos"])}
    split_names = {str(split) for split in splits.values() if split}
    if split_names and "test" not in split_names:
        listed = ", ".join(sorted(split_names))
        raise DataError(f"{path}: has no test split, only {listed}; give test_videodatainfo.json")
    test_videos = {video for video, split in splits.items() if split == "test" or not split_names}
    captions: dict[str, list[Any]] = {}
    for location, entry in iterate_entries(path, found["sentences"]):
        with add_location_to_errors(location):
            captions.setdefault(get_name(entry, "video_id"), []).append(entry.get("caption"))
    tested = {video: texts for video, texts in captions.items() if video in test_videos}
    return [_make_caption_question(path, video, (video,), texts) for video, texts in tested.items()]


def read_msvd_captions(path: Path) -> list[Question]:
    """Read AllVideoDescriptions.txt, lines of a clip's name and a sentence.

    If there is a test_list.txt next to it, only the clips in that list are used.
    """
    path = find_annotation_file(path, "AllVideoDescriptions.txt")
    test_list = path.parent / "test_list.txt"
    test_clips = set(read_text(test_list).split()) if test_list.exists() else None
    mapping = read_youtube_mapping(path.parent / "youtube_mapping.txt")
    captions: dict[str, list[Any]] = {}
    for line in read_text(path).split("\n"):
        name, _, caption = line.strip().partition(" ")
        if name and not name.startswith("#") and caption and (test_clips is None or name in test_clips):
            captions.setdefault(name, []).append(caption)
    if not captions:
        raise DataError(f"{path}: no line of a clip's name and a sentence; is it AllVideoDescriptions.txt?")
    return [
        _make_caption_question(path, name, (name, *mapping.get(name, ())), texts) for name, texts in captions.items()
    ]


def read_vatex_captions(path: Path) -> list[Question]:
    """Read vatex_validation_v1.0.json, videos with their English captions."""
    questions = []
    for location, entry in read_entries(find_annotation_file(path, "vatex_validation_v1.0.json")):
        with add_location_to_errors(location):
            video = get_name(entry, "videoID")
            questions.append(make_caption_question(entry.get("enCap"), id=video, names=(video,)))
    return questions


def read_coco_captions(path: Path) -> list[Question]:
    """Read captions of videos in COCO's layout: `annotations` with image_id and caption, `images` with file_name."""
    path = find_annotation_file(path, "captions.json")
    found = read_annotation_object(path, "annotations")
    images = iterate_entries(path, found["images"]) if found.get("images") else ()
    files = {str(entry.get("id")): entry.get("file_name") for _, entry in images}
    captions: dict[str, list[Any]] = {}
    for location, entry in iterate_entries(path, found["annotations"]):
        with add_location_to_errors(location):
            captions.setdefault(get_name(entry, "image_id", "video_id"), []).append(entry.get("caption"))
    return [_make_caption_question(path, key, (files.get(key) or key,), texts) for key, texts in captions.items()]


def read_jsonl(path: Path) -> list[Question]:
    """Read a user's JSONL file. A line has a video, and a question with its answer (and choices), or captions."""
    questions = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines also splits at U+2028
        location = f"{path}, line {number}"
        if not line.strip():
            continue
        entry = parse_json(line, location, DataError, JSONL_HELP)
        with add_location_to_errors(location, JSONL_HELP):
            questions.append(_parse_jsonl_entry(entry if isinstance(entry, dict) else {}, number))
    return questions


def _parse_jsonl_entry(entry: dict[str, Any], number: int) -> Question:
    entry = {name: value for name, value in entry.items() if value is not None}
    category = entry.get("kind")
    fields: dict[str, Any] = {
        "id": str(entry.get("id", number)),
        "names": (get_name(entry, "video", "image", "audio"),),
        "categories": (str(category),) if category is not None else (),
        **get_time_range(entry),
    }
    if "captions" in entry or "caption" in entry:
        return make_caption_question(entry.get("captions", entry.get("caption")), **fields)
    if "choices" in entry:
        return make_choice_question(entry.get("question"), entry["choices"], entry.get("answer"), **fields)
    return make_open_question(entry.get("question"), entry.get("answer"), **fields)


def _read_question_answers(
    path: Path, names: Callable[[str], tuple[str, ...]], category: Callable[[dict[str, Any]], str]
) -> list[Question]:
    """Read a list of questions with their answers, or test_q.json with the answers of test_a.json next to it.

    The second layout is ActivityNet-QA's; MSVD-QA and MSRVTT-QA are also published in it.

    Args:
        path: The file of the questions.
        names: Returns the possible names of a video's file.
        category: Returns the category of an entry.
    """
    answers: dict[str, dict[str, Any]] = {}
    if path.stem.endswith("_q"):
        answers_path = path.with_name(f"{path.stem.removesuffix('_q')}_a{path.suffix}")
        for location, entry in read_entries(answers_path):
            with add_location_to_errors(location):
                answers[get_name(entry, "question_id", "id")] = entry
    questions = []
    for number, (location, entry) in enumerate(read_entries(path)):
        with add_location_to_errors(location):
            key = str(entry.get("question_id", entry.get("id", number)))
            entry = answers.get(key, {}) | entry
            video = Path(get_name(entry, "video_id", "video_name", "video")).stem
            question, answer = entry.get("question"), entry.get("answer")
            questions.append(
                make_open_question(question, answer, id=key, names=names(video), categories=(category(entry),))
            )
    return questions


def _classify_by_first_word(entry: dict[str, Any]) -> str:
    """Return the category of a question by its first word."""
    first = str(entry.get("question", "")).strip().lower().partition(" ")[0]
    return first if first in QUESTION_WORDS else "other"


def _make_caption_question(path: Path, key: str, names: tuple[str, ...], texts: list[Any]) -> Question:
    with add_location_to_errors(f"{path}, {key}"):
        return make_caption_question(texts, id=key, names=names)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        title: Its name, as its authors write it.
        files: A description of its annotation files, for help and messages.
        read: Reads the questions from the path that the user gives.
    """

    title: str
    files: str
    read: Callable[[Path], list[Question]]


BENCHMARKS: dict[BenchmarkName, Benchmark] = {
    "msvd_qa": Benchmark("MSVD-QA", "test_qa.json", read_msvd_qa),
    "msrvtt_qa": Benchmark("MSRVTT-QA", "test_qa.json", read_msrvtt_qa),
    "activitynet_qa": Benchmark("ActivityNet-QA", "test_q.json, with test_a.json next to it", read_activitynet_qa),
    "video_chatgpt": Benchmark(
        "Video-ChatGPT's five aspects", "the directory of its three JSON files", read_video_chatgpt
    ),
    "mvbench": Benchmark("MVBench", "the directory of its 20 JSON files", read_mvbench),
    "video_mme": Benchmark("Video-MME", "test-00000-of-00001.parquet, or JSON", read_video_mme),
    "msrvtt_captions": Benchmark("MSR-VTT's captions", "test_videodatainfo.json", read_msrvtt_captions),
    "msvd_captions": Benchmark("MSVD's captions", "AllVideoDescriptions.txt", read_msvd_captions),
    "vatex_captions": Benchmark("VATEX's English captions", "vatex_validation_v1.0.json", read_vatex_captions),
    "coco_captions": Benchmark("captions in COCO's layout", "a JSON file", read_coco_captions),
    "jsonl": Benchmark("your own", f"a JSONL file; {JSONL_HELP}", read_jsonl),
}


def read_questions(name: BenchmarkName, path: Path) -> list[Question]:
    """Read the questions of a benchmark.

    Args:
        name: The name of the benchmark.
        path: Its annotation file, or the directory of it.

    Raises:
        DataError: The path is not the annotation file, has no question, or has two questions with the same id.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or directory; --annotations is {BENCHMARKS[name].files}")
    questions = BENCHMARKS[name].read(path)
    if not questions:
        raise DataError(f"{path}: has no questions; --annotations is {BENCHMARKS[name].files}")
    ids: set[str] = set()
    for question in questions:
        if question.id in ids:
            raise DataError(f"{path}: two questions have the id {question.id}; is it the published annotation file?")
        ids.add(question.id)
    return questions
