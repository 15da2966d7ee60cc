"""Process-wide behavior: Ctrl-C, the compilation cache, optional dependencies."""
