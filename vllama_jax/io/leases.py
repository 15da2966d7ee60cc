"""Leases: locks on object stores, which have no file locks.

A lease is an object with its owner and the time of its last renewal. The owner renews it every RENEW_SECONDS. A lease
that was not renewed for STALE_SECONDS belongs to a process that was killed, and another process takes it over.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from vllama_jax.errors import CheckpointError
from vllama_jax.io.json_files import parse_object
from vllama_jax.io.store_path import StorePath

RENEW_SECONDS = 15.0
STALE_SECONDS = 60.0  # a busy host can keep the renewing thread waiting for some seconds
POLL_SECONDS = 1.0
LEASE = ".lease.json"  # of a directory that a process trains into
PARTIAL = ".partial.json"  # of a directory that is not complete

_TOKEN = uuid.uuid4().hex  # of this process
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def hold_lease(lease: StorePath, busy_message: str) -> Iterator[None]:
    """Hold a lease, and renew it in a thread until the end of the block, which removes it.

    If another process holds it, wait until that process renews it, at most STALE_SECONDS.

    Args:
        lease: The object.
        busy_message: Message of the error if another process renews it.

    Raises:
        CheckpointError: Another process holds the lease.
        OSError: The store cannot be read or written.
    """
    while not _create(lease):
        _wait_until_stale(lease, busy_message)
    finished = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, finished), daemon=True, name="vllama-lease")
    renewing.start()
    try:
        yield
    finally:
        finished.set()
        renewing.join()
        with contextlib.suppress(OSError):
            if _holder(lease.read_bytes()) == _TOKEN:
                lease.unlink()


def check_lease(lease: StorePath) -> None:
    """Raise CheckpointError unless this process still holds a lease; another one may have found it stale."""
    try:
        holder = _holder(lease.read_bytes())
    except FileNotFoundError:
        holder = ""
    if holder != _TOKEN:
        raise CheckpointError(
            f"{lease.parent}: another process has taken over its lease, because this one did not renew it for "
            f"{STALE_SECONDS:.0f} s; nothing more is written"
        )


def _create(lease: StorePath) -> bool:
    try:
        lease.create_bytes(_content())
    except FileExistsError:
        return False
    return True


def _wait_until_stale(lease: StorePath, busy_message: str) -> None:
    """Return when the lease is gone or stale, and then removed."""
    start, first = time.monotonic(), _read(lease)
    if first and time.time() - _renewal_time(first) < STALE_SECONDS:
        logger.warning(
            f"{lease.parent}: {_owner(first)} holds its lease; waiting up to {STALE_SECONDS:.0f} s to see whether that "
            "process still runs"
        )
        while time.monotonic() - start < STALE_SECONDS and _read(lease) == first:
            time.sleep(POLL_SECONDS)
    current = _read(lease)
    if current and current != first:
        raise CheckpointError(busy_message)
    if current:
        lease.unlink(missing_ok=True)


def _renew(lease: StorePath, finished: threading.Event) -> None:
    while not finished.wait(RENEW_SECONDS):
        with contextlib.suppress(OSError):  # tried again; what is written meanwhile fails as well
            if _holder(lease.read_bytes()) != _TOKEN:
                return
            lease.write_bytes(_content())


def _content() -> bytes:
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    return json.dumps({"owner": owner, "token": _TOKEN, "renewed": time.time()}).encode()


def _read(lease: StorePath) -> bytes:
    """Return the lease; no bytes if there is none."""
    try:
        return lease.read_bytes()
    except FileNotFoundError:
        return b""


def _fields(content: bytes) -> dict:
    return parse_object(content, "lease", CheckpointError)


def _holder(content: bytes) -> str:
    return str(_fields(content).get("token"))


def _owner(content: bytes) -> str:
    return str(_fields(content).get("owner", "a process"))[:100]


def _renewal_time(content: bytes) -> float:
    """Return when the owner renewed the lease, by its clock; 0 if that is not recorded."""
    renewed = _fields(content).get("renewed")
    return renewed if isinstance(renewed, float) else 0.0
