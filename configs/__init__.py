"""Run configs that are part of the package: Python files that define `config`. Run one with `vllama train NAME`."""
