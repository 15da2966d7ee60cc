"""Compiled programs, kept on disk between runs."""

import os
from pathlib import Path


def keep_compiled_programs() -> None:
    """Points JAX's persistent cache at a folder of ours, unless the user has pointed it elsewhere.

    The folder is $VLLAMA_CACHE, else vllama_jax in $XDG_CACHE_HOME (~/.cache).
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("VLLAMA_CACHE") or caches / "vllama_jax")
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # else nothing small is kept
