"""The parts of the model in torch, to compare ours with: modules whose weights have the names of the published files.

`transformers` has LLaMA and the Q-Former; EVA-CLIP as BLIP-2 uses it and ImageBind are written here from their papers.
They share no code with `nn`, and have epsilons of their own. Only `vllama verify` and tests import this package.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

ReadTensor = Callable[[str], torch.Tensor]


def load_module(
    make: Callable[[], nn.Module], read: ReadTensor, prefix: str, names: Mapping[str, str] | None = None
) -> nn.Module:
    """The module that `make` gives, with a file's tensors as its weights; none is made only to be replaced.

    prefix: of the tensors' names. names: text in the module's own names → text in the file's.
    """
    with torch.device("meta"):
        module = make()

    def name_in_file(name: str) -> str:
        for ours, theirs in (names or {}).items():
            name = name.replace(ours, theirs)
        return prefix + name

    module.load_state_dict({name: read(name_in_file(name)) for name in module.state_dict()}, assign=True)
    return module.eval()
