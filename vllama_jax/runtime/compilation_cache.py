"""JAX's persistent compilation cache."""

import contextlib
import functools
import logging
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

from vllama_jax.io.paths import as_path, cache_directory
from vllama_jax.runtime.coordination import decide, find_store, gather, process_number

logger = logging.getLogger(__name__)


def enable_compilation_cache() -> None:
    """Enable JAX's persistent compilation cache, unless the user has chosen a cache directory or disabled the cache.

    The directory is `compiled` in $VLLAMA_CACHE (or $XDG_CACHE_HOME/vllama_jax, or ~/.cache/vllama_jax). If it cannot
    be written, a warning is logged and the cache stays disabled.

    `vllama_jax.load` and the commands that compile call this function; a process that never loads a model keeps JAX's
    settings. From then on the cache stores everything that the process compiles. Further calls have no effect, and
    threads may call it concurrently.
    """
    import jax

    settings = jax.config.values
    if (chosen := settings["jax_compilation_cache_dir"]) is not None:
        as_path(chosen)  # a URL that cannot be used is an error here; JAX would disable the cache without one
        return
    if not settings["jax_enable_compilation_cache"]:
        return
    try:
        directory = cache_directory() / "compiled"
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        why = getattr(error, "strerror", None) or error
        logger.warning(
            f"the compilation cache is disabled: {getattr(error, 'filename', None) or 'no cache directory'}: {why}"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # JAX's default excludes small programs


def write_cache_on_every_host() -> None:
    """Let one process write the compilation cache of each host. All processes of a job must call this.

    JAX writes from process 0 only, and expects that all hosts share the directory (issue 18819 of jax). The default
    directory is local, so without this the other hosts would compile again at each start. Processes that share a
    directory would write the same files, so only the first of them writes.
    """
    if find_store() is None:
        return
    import jax

    directory = jax.config.values["jax_compilation_cache_dir"]
    is_local = directory is not None and "://" not in directory  # all hosts share a bucket
    if _writes_for_its_host(Path(directory) if is_local else None) and process_number() > 0:
        _write_from_this_process()


def _writes_for_its_host(directory: Path | None) -> bool:
    """Return whether this is the first of the processes that see the files of `directory`."""
    job, process = decide(lambda: uuid.uuid4().hex), process_number()
    marker = None if directory is None else directory / f"process-{job}-{process}"
    if marker is not None:
        with contextlib.suppress(OSError):  # it cannot be written: JAX warns
            marker.touch()
    gather(None)  # all markers exist
    present = [] if directory is None else [int(path.name.rpartition("-")[2]) for path in directory.glob(f"*-{job}-*")]
    gather(None)  # all processes have looked
    if marker is not None:
        marker.unlink(missing_ok=True)
    return min(present, default=-1) == process


@functools.cache
def _write_from_this_process() -> None:
    """Write the programs that this process compiles from now on to its cache. JAX does that in process 0 only."""
    import jax
    from jax._src import compilation_cache, compiler

    write = compiler._cache_write

    def write_here(key: str, seconds: float, name: str, backend: Any, executable: Any, *host_callbacks: Any) -> None:
        write(key, seconds, name, backend, executable, *host_callbacks)
        is_short = seconds < jax.config.values["jax_persistent_cache_min_compile_time_secs"]
        if is_short or any(host_callbacks):  # versions of JAX that pass host callbacks cannot store a program with one
            return
        try:
            compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))
        except Exception as error:  # as in JAX: a run continues without its cache
            logger.warning(f"the compilation cache is not written: {' '.join(str(error).split())}")

    compiler._cache_write = write_here  # type: ignore[assignment]  # parameters have other names
