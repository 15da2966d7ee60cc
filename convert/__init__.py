"""Weights in PyTorch's layouts → a model directory, and back (export.py). The only package that knows PyTorch names."""

from vllama_jax.convert.components import FILE_SPECS
from vllama_jax.convert.conversion import ConversionPlan, bytes_to_write, convert, plan
from vllama_jax.convert.match_weights import Leaf, abstract_shapes, rule_tables

__all__ = [
    "FILE_SPECS",
    "ConversionPlan",
    "Leaf",
    "abstract_shapes",
    "bytes_to_write",
    "convert",
    "plan",
    "rule_tables",
]
