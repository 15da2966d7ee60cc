"""Model directories and the checkpoints of runs: read, write, check and quantize weights."""
