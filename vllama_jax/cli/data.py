"""vllama data."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from vllama_jax.cli._progress import count_bar
from vllama_jax.cli._usage import Command, JsonFlag, UsageError, format_command_list, require_at_least
from vllama_jax.data.sources import SourceName
from vllama_jax.errors import DataError

DATA_COMMANDS = {
    "build": "Make records of annotations and the files that they are about.",
    "check": "Decode every record and list what training would leave out.",
    "stats": "Count records, turns and characters.",
}
MAX_LISTED_ENTRIES = 20  # annotations that the build left out


def select_command(arguments: list[str]) -> tuple[Command, str, list[str]]:
    """The command that the first argument names, its name, and its arguments. Help is printed here."""
    name, *rest = arguments or [""]
    if name in DATA_COMMANDS:
        commands: dict[str, Command] = {"build": build, "check": check, "stats": stats}
        return commands[name], f"vllama data {name}", rest
    if name in ("-h", "--help"):
        print(format_command_list("vllama data", DATA_COMMANDS, "vllama data build jsonl --source clips --out records"))
        sys.exit()
    wrong = f"no command {name!r} of `vllama data`" if name else "`vllama data` needs a command"
    raise UsageError(f"{wrong}; there are {', '.join(DATA_COMMANDS)}")


def build(name: tyro.conf.Positional[SourceName], /, *, source: Path, out: Path, allow_outside: bool = False) -> None:
    """Make a records directory of annotations and the files that they are about.

    Example: vllama data build jsonl --source clips --out records

    Args:
        name: How the source is laid out: as a published dataset (webvid, llava_cc3m, minigpt4, llava_instruct,
            videochat), or as a JSONL or JSON file of your own (jsonl).
        source: The folder that the dataset was unpacked to; for jsonl also the file itself.
        out: The records directory to make.
        allow_outside: Pack media files outside the source's folder too: absolute paths, "..", symlinks that lead out.
    """
    from vllama_jax.data.build import build as make

    with count_bar() as report:
        built = make(name, source, out, report, allow_outside=allow_outside)
    size = _megabytes(sum(built.sizes.values()))
    print(f"{out}: {', '.join(f'{count} {kind}' for kind, count in built.kinds.items())} records, {size}")
    if built.skipped:
        print(f"  left out: {built.skipped} annotations ({out / 'skipped.jsonl'}); the first: {built.first_skipped}")


def check(
    records: tyro.conf.Positional[str],
    /,
    *,
    model: Path | None = None,
    num_frames: int | None = None,
    json_output: JsonFlag = False,
) -> None:
    """Decode every record and list what training would leave out: unreadable, too short, empty. Exits with 1 if any is.

    Example: vllama data check records --model MODEL

    Args:
        records: The records directory, or its URL (gs://, s3://).
        model: Count tokens as this model's tokenizer cuts them, and frames as it takes them.
        num_frames: A video with fewer is too short; the model's own number unless given, 8 without a model.
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
    found = [{"record": one.record, "id": one.id, "why": one.why} for one in findings]
    summary: dict[str, Any] = {"records": len(opened), "problems": found, "skipped": skipped}
    if directory is not None:
        summary["tokens"] = count_tokens(opened, directory.tokenizer).as_dict()
    print(json.dumps(summary) if json_output else "\n".join(_check_lines(records, summary)))
    if findings:
        raise DataError(
            f"{records}: {len(findings)} of {len(opened)} records cannot be used; training leaves them out, "
            "unless you mend their files and build again"
        )


def stats(records: tyro.conf.Positional[str], /, *, json_output: JsonFlag = False) -> None:
    """Report how many records of each kind there are, and how much is said of them.

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
    for kind, found in described.items():
        size, turns = _megabytes(found["bytes"]), found["turns"]
        print(f"{kind}: {found['records']} records of {found['files']} files, {size}, {turns} turns")
        for what in ("questions", "answers"):
            print("  {}: {mean} characters, {longest} at most".format(what, **found[f"characters_of_{what}"]))


def _check_lines(records: str, summary: dict[str, Any]) -> Iterator[str]:
    for found in summary["problems"]:
        yield f"record {found['record']}, {found['id']}: {found['why']}"
    skipped = summary["skipped"]
    for found in skipped[:MAX_LISTED_ENTRIES]:
        place = f" ({found['place']})" if found["place"] not in ("", found["id"]) else ""
        yield f"left out by the build, {found['id']}: {found['why']}{place}"
    if len(skipped) > MAX_LISTED_ENTRIES:
        yield f"left out by the build, {len(skipped) - MAX_LISTED_ENTRIES} more: {records}/skipped.jsonl"
    if "tokens" in summary:
        yield "tokens: {total} in all, {mean} a record, {longest} at most".format(**summary["tokens"])
    usable = summary["records"] - len(summary["problems"])
    yield f"{records}: {usable} of {summary['records']} records can be used"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
