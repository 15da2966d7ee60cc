"""Compiled programs, kept on disk between runs."""

from vllama_jax.files import cache_folder


def keep_compiled_programs() -> None:
    """Points JAX's persistent cache at a folder of ours, unless the user has pointed it elsewhere."""
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # else nothing small is kept
