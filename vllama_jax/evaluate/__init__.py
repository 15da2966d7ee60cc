"""Benchmarks: questions about videos, the answers of a model, and their scores."""
