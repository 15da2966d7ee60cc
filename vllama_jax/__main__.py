"""Run the `vllama` command line as `python -m vllama_jax`."""

from vllama_jax.cli import main

main()
