"""Selection of the JAX platform for commands that need no accelerator."""


def use_cpu_only() -> None:
    """Use the CPU only. Otherwise JAX reserves GPU memory, and fails if another process has the TPU."""
    import jax

    jax.config.update("jax_platforms", "cpu")
