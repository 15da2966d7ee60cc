"""JAX's persistent compilation cache."""

import logging
import os
import tempfile

from vllama_jax.io.paths import as_path, cache_directory

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
