"""Compare the speed with PyTorch in all areas, and write the tables and plots of benchmarks/README.md.

    python benchmarks/compare.py                 # measures all areas, then writes the tables
    python benchmarks/compare.py media decoding  # the scripts of some areas only
    python benchmarks/compare.py --tables        # the tables and plots only, from benchmarks/results

Each script runs in a process of its own, one after the other. A script that fails is reported, and the others run.
Figures of a GPU are in files of their own, and get tables of their own.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.pyplot

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
AREAS = {  # area: its script, and the title of its plot
    "encoders": ("encoders.py", "Encoding"),
    "prefill": ("language.py", "Prefill"),
    "decoding": ("language.py", "Decoding, one step"),
    "answers": ("answers.py", "From files to answers"),
    "media": ("media.py", "Decoding of video"),
    "startup": ("startup.py", "Starting a process"),
}
RATES = {"frames": ("frames/s", 1), "clips": ("clips/min", 60)}  # field of a row: the unit of its rate, units of time


def run_scripts(areas: list[str], arguments: list[str]) -> list[str]:
    """Run the scripts of some areas, and return those that failed."""
    failed = []
    for script in dict.fromkeys(AREAS[area][0] for area in areas):
        start = time.monotonic()
        code = subprocess.run([sys.executable, str(FOLDER / script), *arguments], check=False).returncode
        print(f"{script}: {time.monotonic() - start:.0f} s{f', exit code {code}' if code else ''}\n", flush=True)
        failed += [script] if code else []
    return failed


def format_time(row: Mapping[str, Any], seconds: float) -> str:
    """Format a time, or the rate of a row that has a number of frames or clips."""
    for field, (unit, factor) in RATES.items():
        if field in row:
            return f"{factor * row[field] / seconds:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def make_table(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of an area."""
    lines = ["| | vllama_jax | compared with | | time / its time | time / floor |", "|---|---|---|---|---|---|"]
    for row in results["rows"]:
        floor = f"{row['seconds'] / row['floor']:.2f}" if "floor" in row else ""
        ratio = f"{row['ratio']:.2f}" if row["ratio"] <= 1 else f"**{row['ratio']:.2f}**"
        ours, other = format_time(row, row["seconds"]), format_time(row, row["other_seconds"])
        lines.append(f"| {row['name']} | {ours} | {row['other']} | {other} | {ratio} | {floor} |")
    lines += [f"\n{name}: not measured ({reason})." for name, reason in results.get("missing", {}).items()]
    for row in results["rows"]:
        if "stages" in row:
            stages = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in row["stages"].items())
            lines.append(f"\n{row['name']}, each stage alone: {stages}.")
    return [*lines, "", describe(results)]


def describe(results: Mapping[str, Any]) -> str:
    """Return a sentence about the machine and the versions."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    device = f"{machine['device']}; " if machine["device"] else ""
    return (
        f"{device}{machine['processor']}, {machine['threads']} threads on both sides, {machine['dtype']}, "
        f"load {machine['load']} at the end; {versions}; {machine['date']}."
    )


def draw_plot(area: str, results: Mapping[str, Any], file: Path) -> None:
    """Plot the ratio of each row."""
    rows = results["rows"][::-1]
    figure = matplotlib.figure.Figure(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [f"{row['name']} ({row['other']})" for row in rows],
        [row["ratio"] for row in rows],
        color=["tab:blue" if row["ratio"] <= 1 else "tab:red" for row in rows],
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xlabel="time relative to the other's, less is faster", title=AREAS[area][1])
    with matplotlib.pyplot.rc_context({"svg.hashsalt": area}):  # the same figures give the same file
        figure.savefig(file, metadata={"Date": None})


def write_tables(results: Path, readme: Path) -> None:
    """Write the tables between the markers of the page, and the plots next to the figures."""
    text = readme.read_text()
    for area in AREAS:
        lines: list[str] = []
        for file in sorted(results.glob(f"{area}*.json")):
            found = json.loads(file.read_text())
            draw_plot(area, found, file.with_suffix(".svg"))
            lines += [*make_table(found), "", f"![{AREAS[area][1]}](results/{file.stem}.svg)", ""]
        block = "\n".join([f"<!-- {area} -->", "", *lines, f"<!-- end of {area} -->"])
        text, count = re.subn(rf"<!-- {area} -->.*?<!-- end of {area} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{readme}: no markers of {area}")
    readme.write_text(text)


def main() -> None:
    """Measure, and write the tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", choices=[*AREAS, []], help="by default all")
    parser.add_argument("--tables", action="store_true", help="do not measure")
    parser.add_argument("--size", help="tiny, medium or full")
    parser.add_argument("--rounds", help="number of measurements of each")
    options = parser.parse_args()
    given = {"--size": options.size, "--rounds": options.rounds}
    arguments = [word for name, value in given.items() if value for word in (name, value)]
    failed = [] if options.tables else run_scripts(options.areas or [*AREAS], arguments)
    write_tables(FOLDER / "results", README)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
