"""Logging while a command runs."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator


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
        logging.getLogger("vllama_jax").removeHandler(package)
        logging.getLogger().removeHandler(root)
