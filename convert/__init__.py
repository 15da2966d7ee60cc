"""Weights in PyTorch's layouts → a model directory, and back (export.py). The only package that knows PyTorch names."""

from vllama_jax.convert.components import PIECES
from vllama_jax.convert.conversion import ConversionPlan, bytes_to_write, convert, plan
from vllama_jax.convert.match_weights import Leaf, abstract_shapes, tables

__all__ = ["PIECES", "ConversionPlan", "Leaf", "abstract_shapes", "bytes_to_write", "convert", "plan", "tables"]
