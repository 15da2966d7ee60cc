"""Progress bars on stderr. They are shown only on a terminal and disappear at the end."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def bytes_bar(total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress over `total` bytes; nothing if `total` is 0.

    Yields a function that advances the bar by a number of bytes.
    """
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with _make_progress(*columns, disable=not total) as progress:
        task = progress.add_task("", total=total)
        yield lambda done: progress.advance(task, done)


@contextlib.contextmanager
def count_bar() -> Iterator[Callable[[str, float, float], None]]:
    """Show the progress over a number of items.

    Yields a function that takes the name of the items, how many are done, and the total, or 0 if it is unknown.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _make_progress(*columns) as progress:
        task = progress.add_task("", total=None)
        yield lambda items, done, total: progress.update(task, description=items, completed=done, total=total or None)


def _make_progress(*columns: ProgressColumn, disable: bool = False) -> Progress:
    # not console.is_terminal, which FORCE_COLOR makes true for a pipe too: Jupyter's kernels set it
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=disable or not sys.stderr.isatty())
