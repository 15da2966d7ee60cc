"""The runs that come with the package: Python files that define `config`, named by `vllama train NAME`."""
