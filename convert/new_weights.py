"""New random weights for components of a base model: `vllama convert --base MODEL --without COMPONENT`."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from vllama_jax.branches import get_component
from vllama_jax.config import NO_LORA, VideoLlamaConfig
from vllama_jax.convert.from_model_directory import StoredModel
from vllama_jax.convert.match_weights import abstract_shapes, cast
from vllama_jax.errors import ConfigError, suggest_name

SEED = 42  # as in TrainConfig: a run whose base lacks the component starts from the same weights


class NewWeight:
    """A float32 weight with the random values that training would initialize it with."""

    dtype = np.dtype(np.float32)

    def __init__(self, target: str, shape: tuple[int, ...], config: VideoLlamaConfig, seed: int):
        self.target, self.shape = target, shape
        self._config, self._seed = config, seed

    def blocks(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Yield the weight as one block. All weights of its component are in memory."""
        weights = _init_component(self._config, get_component(self.target), self._seed)
        yield cast(np.asarray(weights[self.target]), dtype, self.target)


@functools.lru_cache(maxsize=1)
def _init_component(config: VideoLlamaConfig, component: str, seed: int) -> dict[str, np.ndarray]:
    """Initialize the weights of a component, by path."""
    import jax

    from vllama_jax.nn.network import init_weights

    paths = [path for path in abstract_shapes(config) if get_component(path) == component]
    draw = jax.jit(functools.partial(init_weights, config, NO_LORA, paths))
    return draw(jax.random.key(seed))


def new_components(config: VideoLlamaConfig, components: Sequence[str], seed: int) -> list[NewWeight]:
    """Return new weights for components. They are initialized when they are read.

    Args:
        config: The config of the new model.
        components: Names of components, such as "video_qformer".
        seed: The seed of the initialization.

    Raises:
        ConfigError: A model of this config has no such component.
    """
    shapes = abstract_shapes(config)
    known = sorted({get_component(path) for path in shapes})
    for name in components:
        if name not in known:
            advice = suggest_name(name, known) or f"the model has {', '.join(known)}"
            raise ConfigError(f"--without {name}: unknown component; {advice}")
    return [NewWeight(path, shape, config, seed) for path, shape in shapes.items() if get_component(path) in components]


def drop_components(base: StoredModel | None, components: Sequence[str]) -> None:
    """Remove components from the weights of a base. Raises ConfigError if there are components but no base."""
    if base is None:
        if components:
            raise ConfigError(
                f"--without {components[0]}: needs --base, the model directory whose component is replaced"
            )
        return
    for target in [target for target in base.leaves if get_component(target) in components]:
        del base.leaves[target]
        base.trained_paths.discard(target)
