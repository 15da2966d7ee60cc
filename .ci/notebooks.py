"""Execute the notebooks of examples/notebooks and store their outputs: of all, or of those named.

    python .ci/notebooks.py [NAME …]

Each runs in an empty directory. A cell that raises an error or prints a warning ends the command with exit code 1, and
the notebook's file stays as it was. Times of execution and versions are not stored.
"""

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
CELL_SECONDS = 1200  # the longest cell trains for about two minutes on two idle cores
PLAIN_TEXT = {"TTY_COMPATIBLE": "0"}  # read by rich: the kernel sets FORCE_COLOR, which would store escape sequences


def execute(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of a run in an empty directory.

    Raises:
        CellExecutionError: A cell raised an error.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            resources={"metadata": {"path": folder}},
            coalesce_streams=True,
            record_timing=False,
        )
        client.execute(env=os.environ | PLAIN_TEXT)
    notebook.metadata["language_info"] = {"name": "python"}  # without the version of this machine
    return notebook


def list_warnings(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the lines in the outputs of a notebook that are warnings."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    lines = [line for output in outputs for line in output.get("text", "").splitlines()]
    return [line for line in lines if "warning" in line.lower()]


def main(names: list[str]) -> None:
    """Execute and store notebooks."""
    paths = [NOTEBOOKS / f"{Path(name).stem}.ipynb" for name in names] or sorted(NOTEBOOKS.glob("*.ipynb"))
    for path in paths:
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            notebook = execute(path)
        except (OSError, CellExecutionError, DeadKernelError) as error:
            sys.exit(f"{path.name}: {error}")
        if warnings := list_warnings(notebook):
            sys.exit("\n".join([f"{path.name} has warnings in its outputs:", *warnings]))
        nbformat.write(notebook, path)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds, cpu_seconds = time.perf_counter() - start, used.ru_utime - before.ru_utime
        memory = f"{used.ru_maxrss / 1e6:.1f} GB in the largest process so far"
        print(
            f"{path.name}: {seconds:.0f} s, {cpu_seconds:.0f} CPU s, {memory}, {path.stat().st_size / 1e3:.0f} kB",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
