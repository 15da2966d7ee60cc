"""Which devices a command uses."""


def leave_accelerators() -> None:
    """For commands that need none: JAX would take a GPU's memory, and fails where another process has the TPU."""
    import jax

    jax.config.update("jax_platforms", "cpu")
