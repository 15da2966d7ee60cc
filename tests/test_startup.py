"""The start of a chat imports no unneeded packages and draws no unneeded random weights."""

import subprocess
import sys

import jax
import pytest
from flax import nnx

from vllama_jax.config import NO_LORA, LoraConfig, tiny
from vllama_jax.nn.layers import traced_rngs
from vllama_jax.nn.network import abstract_network, init_network


@pytest.mark.slow
@pytest.mark.parametrize("lora", [NO_LORA, LoraConfig(rank=4, alpha=8.0)], ids=["", "lora"])
def test_the_abstract_network_has_the_structure_of_the_training_network(lora):
    config = tiny(vocab_size=512)
    full = nnx.eval_shape(lambda: init_network(config, lora, traced_rngs(jax.random.key(0))))
    abstract = abstract_network(config, "float32", lora)
    assert jax.tree.structure(abstract) == jax.tree.structure(full)
    assert nnx.split(abstract)[0] == nnx.split(full)[0]
    shapes = [[leaf.shape for leaf in jax.tree.leaves(network)] for network in (abstract, full)]
    assert shapes[0] == shapes[1]


def test_audio_features_import_no_numba():
    """librosa's framing would, which adds a second to the start of every chat."""
    code = "import sys, numpy, vllama_jax.media as media; media.mel_clips(numpy.zeros((1, 44100), 'float32'), 44100)\n"
    code += "print({'librosa', 'numba', 'scipy', 'jax'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
