"""Ahead-of-time compilation for TPU topologies, and the memory, FLOPs and time of the compiled programs."""
