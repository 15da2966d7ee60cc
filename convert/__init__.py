"""Convert PyTorch weight files to model directories and back, and verify the result.

`plan` and `convert` make a model directory, `convert.export` writes one as PyTorch files, and `convert.verify` compares
the two. No other package depends on the tensor names and layouts of PyTorch files.
"""

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
