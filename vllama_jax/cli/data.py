"""The commands `vllama data build`, `vllama data check` and `vllama data stats`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from vllama_jax.cli._display import format_count
from vllama_jax.cli._progress import count_bar
from vllama_jax.cli._usage import Command, JsonFlag, UsageError, format_command_list, require_at_least
from vllama_jax.data.sources import SourceName
from vllama_jax.errors import DataError

DATA_COMMANDS = {
    "build": "Build records from annotation files and media files.",
    "check": "Decode every record and list those that cannot be trained on.",
    "stats": "Count records, turns and characters.",
}
MAX_LISTED_ENTRIES = 20  # entries that the build skipped


def select_command(arguments: list[str]) -> tuple[Command, str, list[str]]:
    """Return the command that the first argument names, the words that start it, and its arguments.

    Raises:
        UsageError: The first argument names no command.
        SystemExit: It is `--help`; the help is printed.
    """
    name, *rest = arguments or [""]
    if name in DATA_COMMANDS:
        commands: dict[str, Command] = {"build": build, "check": check, "stats": stats}
        return commands[name], f"vllama data {name}", rest
    if name in ("-h", "--help"):
        print(format_command_list("vllama data", DATA_COMMANDS, "vllama data build jsonl --source clips --out records"))
        sys.exit()
    problem = f"{name!r} is not a command of `vllama data`;" if name else "`vllama data` needs a command:"
    raise UsageError(f"{problem} choose one of {', '.join(DATA_COMMANDS)}")


def build(name: tyro.conf.Positional[SourceName], /, *, source: Path, out: Path, allow_outside: bool = False) -> None:
    """Build a records directory from annotation files and the media files that they list.

    Example: vllama data build jsonl --source clips --out records

    Args:
        name: The layout of the source: a published dataset (webvid, llava_cc3m, minigpt4, llava_instruct, videochat),
            or a JSONL or JSON file of your own (jsonl).
        source: The directory of the unpacked dataset; for jsonl, the file or its directory.
        out: The records directory to create.
        allow_outside: Include media files outside the source directory: absolute paths, "..", symbolic links.
    """
    from vllama_jax.data.build import build as build_records

    with count_bar() as report:
        built = build_records(name, source, out, report, allow_outside=allow_outside)
    size = _format_megabytes(sum(built.sizes.values()))
    counts = ", ".join(format_count(count, f"{kind} record") for kind, count in built.kinds.items())
    print(f"{out}: {counts}, {size}")
    if built.skipped:
        skipped = format_count(built.skipped, "entry", "entries")
        print(f"  skipped {skipped} ({out / 'skipped.jsonl'}), first {built.first_skipped}")


def check(
    records: tyro.conf.Positional[str],
    /,
    *,
    model: Path | None = None,
    num_frames: int | None = None,
    json_output: JsonFlag = False,
) -> None:
    """Decode every record and list those that training would skip: unreadable, too short or empty.

    The exit code is 1 if there are any.

    Example: vllama data check records --model MODEL

    Args:
        records: The records directory, or its URL (gs://, s3://).
        model: Also count tokens with this model's tokenizer, and use its number of frames.
        num_frames: The minimum number of frames of a video; by default the model's, or 8 without a model.
        json_output: Print one JSON object.
    """
    from vllama_jax.checkpoints.directory import open_model
    from vllama_jax.config import VideoLlamaConfig
    from vllama_jax.data.check import count_tokens, find_unusable
    from vllama_jax.data.records import open_records

    require_at_least(1, num_frames=num_frames)
    opened = open_records(records)
    directory = open_model(model) if model is not None else None
    if num_frames is None:
        num_frames = (directory.config if directory else VideoLlamaConfig).num_frames
    skipped = list(opened.skipped())
    with count_bar() as report:
        findings = find_unusable(opened, num_frames, lambda count: report("records", count, len(opened)))
    problems = [{"record": finding.record, "id": finding.id, "why": finding.why} for finding in findings]
    summary: dict[str, Any] = {"records": len(opened), "problems": problems, "skipped": skipped}
    if directory is not None:
        summary["tokens"] = count_tokens(opened, directory.tokenizer).as_dict()
    print(json.dumps(summary) if json_output else "\n".join(_format_check(records, summary)))
    if findings:
        raise DataError(
            f"{records}: {len(findings)} of {len(opened)} records cannot be used; training skips them, "
            "unless you repair their files and build again"
        )


def stats(records: tyro.conf.Positional[str], /, *, json_output: JsonFlag = False) -> None:
    """Report the number of records of each kind of media, and the length of their texts.

    Example: vllama data stats records

    Args:
        records: The records directory, or its URL (gs://, s3://).
        json_output: Print one JSON object.
    """
    from vllama_jax.data.check import describe_records
    from vllama_jax.data.records import open_records

    described = describe_records(open_records(records))
    if json_output:
        print(json.dumps(described))
        return
    for kind, counts in described.items():
        records_and_files = f"{format_count(counts['records'], 'record')} of {format_count(counts['files'], 'file')}"
        size, turns = _format_megabytes(counts["bytes"]), format_count(counts["turns"], "turn")
        print(f"{kind}: {records_and_files}, {size}, {turns}")
        for texts in ("questions", "answers"):
            print("  {}: mean {mean} characters, maximum {longest}".format(texts, **counts[f"characters_of_{texts}"]))


def _format_check(records: str, summary: dict[str, Any]) -> Iterator[str]:
    for problem in summary["problems"]:
        yield f"record {problem['record']}, {problem['id']}: {problem['why']}"
    skipped = summary["skipped"]
    for entry in skipped[:MAX_LISTED_ENTRIES]:
        location = f" ({entry['place']})" if entry["place"] not in ("", entry["id"]) else ""
        yield f"skipped by the build: {entry['id']}: {entry['why']}{location}"
    if len(skipped) > MAX_LISTED_ENTRIES:
        yield f"skipped by the build: {len(skipped) - MAX_LISTED_ENTRIES} more, see {records}/skipped.jsonl"
    if "tokens" in summary:
        yield "tokens: {total} in total, mean {mean} per record, maximum {longest}".format(**summary["tokens"])
    usable = summary["records"] - len(summary["problems"])
    yield f"{records}: {usable} of {summary['records']} records can be used"


def _format_megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
