"""PyTorch references of the components, with the tensor names of the published files.

LLaMA and the Q-Former are those of `transformers`. EVA-CLIP (as BLIP-2 uses it) and ImageBind are implemented here from
their papers. They share no code or constants with `vllama_jax.nn`. Only `vllama verify` and tests import this package.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

ReadTensor = Callable[[str], torch.Tensor]


def load_module(
    make: Callable[[], nn.Module], read: ReadTensor, prefix: str, names: Mapping[str, str] | None = None
) -> nn.Module:
    """Create a module with the tensors of a file as its weights.

    Args:
        make: Creates the module. It is called on the meta device, so that no weights are allocated.
        read: Reads a tensor of the file.
        prefix: The prefix of the tensor names.
        names: Substrings of the module's parameter names, and their replacements in the file's names.

    Returns:
        The module, in evaluation mode.
    """
    with torch.device("meta"):
        module = make()

    def name_in_file(name: str) -> str:
        for ours, theirs in (names or {}).items():
            name = name.replace(ours, theirs)
        return prefix + name

    module.load_state_dict({name: read(name_in_file(name)) for name in module.state_dict()}, assign=True)
    return module.eval()
