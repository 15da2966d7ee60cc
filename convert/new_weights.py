"""Components of a base model that a conversion gives new weights: `vllama convert --base MODEL --without COMPONENT`."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from vllama_jax.branches import get_component
from vllama_jax.config import NO_LORA, VideoLlamaConfig
from vllama_jax.convert.from_model_directory import StoredModel
from vllama_jax.convert.match_weights import abstract_shapes, cast
from vllama_jax.errors import ConfigError, suggest_name

SEED = 42  # that of a TrainConfig: the weights are those that a run without the component would start from


class NewWeight:
    """A weight that starts at random, as training starts it, float32."""

    dtype = np.dtype(np.float32)

    def __init__(self, target: str, shape: tuple[int, ...], config: VideoLlamaConfig, seed: int):
        self.target, self.shape = target, shape
        self._config, self._seed = config, seed

    def blocks(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """The weight as one block; its whole component is in memory meanwhile."""
        drawn = _init_component(self._config, get_component(self.target), self._seed)
        yield cast(np.asarray(drawn[self.target]), dtype, self.target)


@functools.lru_cache(maxsize=1)
def _init_component(config: VideoLlamaConfig, component: str, seed: int) -> dict[str, np.ndarray]:
    """The new weights of a component by path."""
    import jax

    from vllama_jax.nn.network import init_weights

    paths = [path for path in abstract_shapes(config) if get_component(path) == component]
    draw = jax.jit(functools.partial(init_weights, config, NO_LORA, paths))
    return draw(jax.random.key(seed))


def new_components(config: VideoLlamaConfig, components: Sequence[str], seed: int) -> list[NewWeight]:
    """The weights of these components, to be drawn when they are written.

    Raises:
        ConfigError: A model of this config has no such component.
    """
    shapes = abstract_shapes(config)
    known = sorted({get_component(path) for path in shapes})
    for name in components:
        if name not in known:
            advice = suggest_name(name, known) or f"the model has {', '.join(known)}"
            raise ConfigError(f"--without {name}: no such component; {advice}")
    return [NewWeight(path, shape, config, seed) for path, shape in shapes.items() if get_component(path) in components]


def drop_components(base: StoredModel | None, components: Sequence[str]) -> None:
    """Take components out of what a base gives. Raises ConfigError where there is no base."""
    if base is None:
        if components:
            raise ConfigError(f"--without {components[0]}: leaves a component of --base out; give a base")
        return
    for target in [target for target in base.leaves if get_component(target) in components]:
        del base.leaves[target]
        base.trained_paths.discard(target)
