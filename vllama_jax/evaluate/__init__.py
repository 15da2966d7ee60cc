"""Benchmarks: questions about videos, a model's answers, and what they are worth."""
