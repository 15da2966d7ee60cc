"""What libraries and our own modules log while a command runs."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator


class _StderrHandler(logging.Handler):
    """Prints a message as commands print theirs. sys.stderr is looked up each time: progress bars replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"vllama: {record.getMessage()}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def configure_logging() -> Iterator[None]:
    """Print our warnings on stderr without a prefix of level and module, and keep other packages' quiet.

    Python's -W and PYTHONWARNINGS win where they are given.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own log in C++: errors only
    ours, root = _StderrHandler(logging.WARNING), logging.NullHandler()  # a root that has a handler gets no other
    logging.getLogger("vllama_jax").addHandler(ours)
    logging.getLogger().addHandler(root)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                for category in (UserWarning, RuntimeWarning, FutureWarning):
                    warnings.simplefilter("ignore", category)
            yield
    finally:
        logging.getLogger("vllama_jax").removeHandler(ours)
        logging.getLogger().removeHandler(root)
