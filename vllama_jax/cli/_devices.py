"""Which devices a command uses."""


def use_cpu_only() -> None:
    """For commands that need none: JAX would take a GPU's memory, and fails where another process has the TPU."""
    import jax

    jax.config.update("jax_platforms", "cpu")
