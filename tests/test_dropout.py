"""Dropout compared with manual computation: scaling, independent masks, and where a Q-Former applies them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vllama_jax.config import QFormerConfig
from vllama_jax.nn import attention, qformer
from vllama_jax.nn.attention import attend
from vllama_jax.nn.dropout import Dropout, apply_dropout, split_dropout, unstack_dropout

CFG = QFormerConfig(width=8, depth=2, num_heads=2, mlp_dim=16, num_queries=4)
RATE = 0.25


def test_dropout_zeroes_a_quarter_and_keeps_the_mean():
    x = jnp.full((200, 200), 3.0)
    dropped = np.asarray(apply_dropout(x, Dropout(jax.random.key(0), RATE)))
    assert set(np.unique(dropped)) == {0.0, 4.0}
    assert (dropped == 0).mean() == pytest.approx(RATE, abs=0.01)  # five standard deviations
    assert apply_dropout(x, None) is x


def test_split_keys_differ_from_each_other_and_from_their_source():
    source = Dropout(jax.random.key(0), RATE)
    keys = [source.key, *split_dropout(source, 3).key, *[one.key for one in unstack_dropout(split_of(source), 2)]]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 6
    assert split_dropout(None, 3) is None
    assert unstack_dropout(None, 2) == [None, None]
    assert unstack_dropout(source, 2)[1].rate == RATE


def split_of(dropout: Dropout) -> Dropout:
    """Return the dropout of one layer, as `split_dropout` makes it."""
    return Dropout(split_dropout(dropout, 2).key[1], dropout.rate)


@pytest.mark.slow
def test_attention_drops_weights_and_not_values():
    """With equal scores, and a value of 1 at one key only, an output is that key's weight: 0 or 1 / 4 / (1 - rate)."""
    query, key = jnp.ones((1, 500, 1, 2)), jnp.ones((1, 4, 1, 2))
    value = jnp.zeros((1, 4, 1, 2)).at[0, 2].set(1.0)
    found = np.asarray(attend(query, key, value, dropout=Dropout(jax.random.key(1), RATE)))
    np.testing.assert_array_equal(found[..., 0], found[..., 1])
    np.testing.assert_allclose(np.unique(found.round(6)), [0, 1 / 3], atol=1e-5)
    assert (found == 0).mean() == pytest.approx(RATE, abs=0.1)


@pytest.fixture
def dropped(monkeypatch) -> list[tuple[tuple[int, ...], jax.Array]]:
    """The shapes and keys of all dropout calls."""
    found = []

    def recorded(x, dropout):
        if dropout is not None:
            found.append((x.shape, jax.random.key_data(dropout.key)))
        return x

    monkeypatch.setattr(attention, "apply_dropout", recorded)
    monkeypatch.setattr(qformer, "apply_dropout", recorded)
    return found


def different_keys(run, dropped) -> int:
    """Count the keys that `run` uses; compiling it once is faster than running it operation by operation."""

    @jax.jit
    def keys(key):
        dropped.clear()
        run(Dropout(key, RATE))
        return [key for _, key in dropped]

    return len({tuple(key.tolist()) for key in keys(jax.random.key(0))})


def test_a_layer_applies_dropout_where_bert_does_with_independent_masks(dropped):
    """Reference: Qformer.py, dropout of attention weights and of the outputs of the three sublayers."""
    x, memory = jnp.ones((3, 4, 8)), jnp.ones((3, 5, 6))

    def run(dropout):
        qformer.Layer(CFG, 6, rngs=nnx.Rngs(0))(x, memory, dropout)

    assert different_keys(run, dropped) == 5
    weights, added = [(3, 2, 1, 4, 4), (3, 2, 1, 4, 5)], (3, 4, 8)
    assert [shape for shape, _ in dropped] == [weights[0], added, weights[1], added, added]


def test_queries_and_each_layer_have_their_own_dropout_mask(dropped, monkeypatch):
    """Layers run in a Python loop here instead of a scan, so that their keys can be recorded."""

    def one_after_the_other(stacked, x, step, remat_policy="full"):
        for layer in [jax.tree.map(lambda leaf, n=number: leaf[n], stacked) for number in range(2)]:
            x = step(layer, x)
        return x

    monkeypatch.setattr(qformer, "run_stack", one_after_the_other)

    def run(dropout):
        qformer.QFormer(CFG, 6, rngs=nnx.Rngs(0))(jnp.ones((3, 5, 6)), dropout)

    assert different_keys(run, dropped) == 1 + 2 * 5
    assert dropped[0][0] == (3, 4, 8), "the queries, before the first layer"


def test_without_dropout_nothing_is_dropped(dropped):
    jax.eval_shape(lambda: qformer.QFormer(CFG, 6, rngs=nnx.Rngs(0))(jnp.ones((3, 5, 6))))
    assert dropped == []
