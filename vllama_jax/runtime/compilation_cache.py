"""Compiled programs, kept on disk from one process to the next."""

import logging
import os
import tempfile

from vllama_jax.io.paths import cache_directory

logger = logging.getLogger(__name__)


def enable_compilation_cache() -> None:
    """Point JAX's persistent compilation cache at a folder of ours, unless the user has chosen one or switched it off.

    `vllama_jax.load` and the commands that compile call this, so that a process which never loads a model keeps JAX's
    own settings. Once it is called, the cache also holds what the process compiles besides. Calls after the first
    change nothing; threads may call it at once.

    $VLLAMA_CACHE (or $XDG_CACHE_HOME/vllama_jax, or ~/.cache/vllama_jax) is the folder. One that cannot be written is
    logged as a warning and not used.
    """
    import jax

    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] is not None or not settings["jax_enable_compilation_cache"]:
        return
    try:
        folder = cache_directory() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        why = getattr(error, "strerror", None) or error
        logger.warning(
            f"compiled programs are not kept: {getattr(error, 'filename', None) or 'no cache folder'}: {why}"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # else nothing small is kept
