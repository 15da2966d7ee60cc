"""vllama data."""

import concurrent.futures
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import track

from vllama_jax.data.records import Records, open_records
from vllama_jax.errors import DataError, VllamaError
from vllama_jax.media import as_file, mel_clips, read_audio, read_image, read_video

Json = Annotated[bool, tyro.conf.arg(name="json")]


def with_config(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command, and its arguments: `data` has commands of its own."""
    known = {"build": build, "check": check, "stats": stats}
    if arguments and arguments[0] in known:
        return known[arguments[0]], arguments[1:]
    return data, arguments


def data(command: tyro.conf.Positional[Literal["build", "check", "stats"]], /) -> None:
    """Training data: build records, check them, describe them. `vllama data build --help` tells more.

    Example: vllama data build jsonl --source clips --out records

    Args:
        command: What to do.
    """


def build(
    name: tyro.conf.Positional[Literal["webvid", "llava_cc3m", "minigpt4", "llava_instruct", "videochat", "jsonl"]],
    /,
    *,
    source: Path,
    out: Path,
) -> None:
    """Make a records directory of annotations and files.

    Example: vllama data build jsonl --source clips --out records

    Args:
        name: How the source is laid out: a published dataset, or a JSONL file of one's own.
        source: The folder that the dataset was unpacked to.
        out: The records directory to make.
    """
    from vllama_jax.data.build import build as make

    built = make(name, source, out)
    counts = ", ".join(f"{count} {kind}" for kind, count in built.kinds.items())
    print(f"{out}: {counts} records, {built.bytes / 1e6:.1f} MB")
    if built.skipped:
        print(f"  left out, {len(built.skipped)} annotations (skipped.jsonl); the first: {': '.join(built.skipped[0])}")


def check(
    records: tyro.conf.Positional[Path],
    /,
    *,
    model: Path | None = None,
    num_frames: int = 8,
    json_output: Json = False,
) -> None:
    """Decode every record, and list what training would leave out: missing, unreadable, too short.

    Example: vllama data check records --model MODEL

    Args:
        records: The records directory.
        model: Count tokens as this model's tokenizer cuts them.
        num_frames: A video with fewer is too short.
        json_output: Print one JSON object.
    """
    opened = open_records(records)
    skipped = [json.loads(line) for line in (records / "skipped.jsonl").read_text().splitlines()]
    numbers = track(range(len(opened)), "checking", console=Console(stderr=True), transient=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        problems = [found for found in pool.map(lambda number: _problem(opened, number, num_frames), numbers) if found]
    summary = {"records": len(opened), "skipped": skipped, "problems": problems}
    if model is not None:
        summary["tokens"] = _tokens(opened, model)
    if json_output:
        print(json.dumps(summary))
    else:
        for found in [*skipped, *problems]:
            print(f"{found['id']}: {found['why']}")
        if "tokens" in summary:
            print("tokens: {total} in all, {mean} a record, {longest} at most".format(**summary["tokens"]))
        print(
            f"{records}: {len(opened)} records, {len(problems)} of them cannot be used; {len(skipped)} left out before"
        )
    if problems:
        raise DataError(f"{records}: {len(problems)} of {len(opened)} records cannot be used; training leaves them out")


def stats(records: tyro.conf.Positional[Path], /, *, json_output: Json = False) -> None:
    """Tell how many records of each kind there are, and how much is said of them.

    Example: vllama data stats records

    Args:
        records: The records directory.
        json_output: Print one JSON object.
    """
    opened = open_records(records)
    summary = {}
    for kind, numbers in opened.kinds.items():
        annotations = [opened.annotation(number) for number in numbers]
        if not annotations:
            continue
        answers = [len(answer) for annotation in annotations for _, answer in annotation.turns]
        summary[kind] = {
            "records": len(annotations),
            "files": len({annotation.id for annotation in annotations}),
            "turns": len(answers),
            "characters_of_answers": {"mean": round(statistics.mean(answers), 1), "longest": max(answers)},
        }
    if json_output:
        print(json.dumps(summary))
        return
    for kind, found in summary.items():
        said = found["characters_of_answers"]
        print(
            f"{kind}: {found['records']} records of {found['files']} files, {found['turns']} turns, "
            f"answers of {said['mean']} characters, {said['longest']} at most"
        )


def _problem(records: Records, number: int, num_frames: int) -> dict[str, str] | None:
    """Why a record cannot be used, if so."""
    name = f"record {number}"
    try:
        annotation = records.annotation(number)
        name = annotation.id
        with as_file(records.media(number), name) as path:
            if annotation.kind == "image":
                read_image(path)
            elif annotation.kind == "audio":
                sound = read_audio(path)
                mel_clips(sound.waveform, sound.sample_rate)
            elif len(frames := read_video(path, num_frames, audio=False).frames) < num_frames:
                return {"id": name, "why": f"too short, {len(frames)} frames of {num_frames}"}
    except VllamaError as error:
        return {"id": name, "why": str(error)}
    return None


def _tokens(records: Records, model: Path) -> dict[str, Any]:
    from vllama_jax.checkpoint import open_model

    tokenizer = open_model(model).tokenizer
    counts = Counter()
    for number in range(len(records)):
        turns = records.annotation(number).turns
        counts[number] = sum(len(tokenizer.encode(text, special=False)) for turn in turns for text in turn)
    total = sum(counts.values())
    return {"total": total, "mean": round(total / len(counts), 1), "longest": max(counts.values())}
