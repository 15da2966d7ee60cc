"""Logging while a command runs."""

import contextlib
import logging
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from vllama_jax.io.atomic import ensure_directory
from vllama_jax.runtime.coordination import describe_process


class _StderrHandler(logging.Handler):
    """Prints log messages on stderr. Looks up `sys.stderr` for each message, because progress bars replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"vllama: {record.getMessage()}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def configure_logging() -> Iterator[None]:
    """Print warnings of this package on stderr without level and module name, and silence those of other packages.

    Python's `-W` option and PYTHONWARNINGS take precedence.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only in the log of XLA's C++ code
    package, root = _StderrHandler(logging.WARNING), logging.NullHandler()  # logging adds none to a root that has one
    logging.getLogger("vllama_jax").addHandler(package)
    logging.getLogger().addHandler(root)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                for category in (UserWarning, RuntimeWarning, FutureWarning):
                    warnings.simplefilter("ignore", category)
            yield
    finally:
        for handler in logging.getLogger("vllama_jax").handlers[:]:
            logging.getLogger("vllama_jax").removeHandler(handler)
            handler.close()
        logging.getLogger("vllama_jax").setLevel(logging.NOTSET)
        logging.getLogger().removeHandler(root)


def log_to_file(directory: Path, process: int, num_processes: int) -> None:
    """Append everything that this process reports to `directory`/process_N.log, with times, until the command ends.

    Args:
        directory: The directory, which is created if it does not exist. It may be local to each host.
        process: The number of this process.
        num_processes: The number of processes of the job.
    """
    ensure_directory(directory)
    handler = logging.FileHandler(directory / f"process_{process}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    package = logging.getLogger("vllama_jax")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.info(f"{describe_process(process, num_processes, socket.gethostname())}: {shlex.join(sys.argv)}")
