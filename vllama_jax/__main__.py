"""`python -m vllama_jax`: the same as `vllama`."""

from vllama_jax.cli import main

main()
