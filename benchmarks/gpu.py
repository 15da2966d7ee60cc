"""Check and measure one GPU in less than ten minutes: parity, attention, a training step, encoding and decoding.

    python benchmarks/gpu.py [--seconds 540] [--json FILE]
    python benchmarks/gpu.py --size tiny

For an H100 or H200. Weights are random, so that nothing but this package is needed. The sections, most important first:

    parity      each component at full width, in float32 and bfloat16, compared with float32 on the CPU
    attention   cuDNN's attention at the head dimensions of the frozen towers, compared with the einsum: error and time
    train_step  a step of stage 1 of the 7B model: time, MFU, and peak memory compared with the estimate
    encode      videos and audio to media tokens
    decode      a token of the 7B language model at batch 1, 8 and 32, compared with the time to read its bytes

Each runs in a process of its own. An error in one is printed in a line, and the others run; what no time is left for is
skipped. The exit code is 1 if an error exceeds its bound or a section fails. FILE has all figures, and the tracebacks.
`--size tiny` runs the same code on a tiny model and without a GPU, whose figures are then "not measured".
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllama_jax.io.atomic import check_output_files, replace_json
from vllama_jax.io.jsonl import JsonLinesFile

SCRIPT = Path(__file__).with_name("gpu_sections.py")
NO_TIME = "no time left"
SECTIONS = ("device", "parity", "attention", "train_step", "encode", "decode")
Record = Mapping[str, Any]


def run_section(section: str, size: str, seconds: float) -> list[Record]:
    """Run a section in a new process, which is killed after `seconds`.

    Returns:
        A record for each case: "section" and "case", and "figures", "failed" or "skipped". A section that ends early
        has one more, without a case.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as log:
        file = Path(folder, "records.jsonl")
        command = [sys.executable, str(SCRIPT), section, size, str(seconds), str(file)]
        try:
            code = subprocess.run(command, stdout=log, stderr=log, timeout=seconds, check=False).returncode
            ended = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        records: list[Record] = list(JsonLinesFile(file).read())
        if ended:
            log.seek(0)
            output = log.read()
            last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
            records.append({"section": section, "failed": f"{ended}: {last[:200]}", "traceback": output[-10_000:]})
        return records


def find_problem(record: Record) -> str:
    """Return why a record makes the script fail: the section failed, or an error exceeds its bound; "" if none."""
    if "failed" in record:
        return record["failed"]
    figures = record.get("figures", {})
    exceeded = [name for name in figures if find_bound(name) and not figures[name] <= figures[find_bound(name)]]
    return f"{' and '.join(exceeded)} above the bound".replace("_", " ") if exceeded else ""


def find_bound(name: str) -> str:
    """Return the name of the bound of an error; "" for other figures."""
    return f"{name.removesuffix('error')}bound" if name.endswith("error") else ""


def format_record(record: Record) -> str:
    """Format a record as a line."""
    where = f"{record['section']}: {record['case']}" if "case" in record else record["section"]
    figures = record.get("figures", {})
    parts = [format_figure(name, figures) for name in figures if figures[name] is not None and name[-5:] != "bound"]
    missing = [name.replace("_", " ") for name, value in figures.items() if value is None]
    parts += [f"not measured: {', '.join(missing)}"] if missing else []
    parts += [f"skipped: {record['skipped']}"] if "skipped" in record else []
    problem = find_problem(record)
    parts += [f"FAILED: {problem}"] if problem else []
    return f"{where}: {'; '.join(parts)}"


def format_figure(name: str, figures: Mapping[str, Any]) -> str:
    """Format a figure with its name, a number with four digits, an error with its bound."""
    value = figures[name]
    text = f"{name.replace('_', ' ')} {value if isinstance(value, str) else f'{value:.4g}'}"
    return f"{text} (bound {figures[find_bound(name)]:.4g})" if find_bound(name) else text


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=lines[0], epilog="\n".join(lines[1:]))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny runs on a CPU too")
    parser.add_argument("--seconds", type=float, default=540, help="stop after this time (default: 540)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    options = parser.parse_args()
    if options.seconds <= 0:
        parser.error(f"--seconds must be above 0, not {options.seconds:g}")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: {options.json.parent} is not a directory")
    return options


def main() -> None:
    """Run all sections, and print and write the figures of each when it ends."""
    options = parse_arguments()
    if options.json:
        check_output_files(options.json.parent, [options.json.name])
    start, records = time.monotonic(), list[Record]()
    for section in SECTIONS:
        left = options.seconds - (time.monotonic() - start)
        new = [{"section": section, "skipped": NO_TIME}] if left <= 0 else run_section(section, options.size, left)
        records += new
        print(*map(format_record, new), sep="\n", flush=True)
        if options.json:
            replace_json(options.json, {"size": options.size, "records": records})
        if section == "device" and any(map(find_problem, new)):
            break
    print(f"{time.monotonic() - start:.0f} s")
    sys.exit(any(map(find_problem, records)))


if __name__ == "__main__":
    main()
