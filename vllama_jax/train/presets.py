"""Presets: the mesh and the batch size of the shipped run configs for TPU slices and GPU hosts.

`vllama train vision_stage1@v5e-256` runs the config `vision_stage1` with the preset `v5e-256`. A preset sets `mesh` and
`batch_size` and nothing else. docs/scaling.md has the memory and the expected speed of each, and the reasons for the
choices. Importing this module does not import jax.
"""

import dataclasses

from vllama_jax.errors import ConfigError, suggest_name
from vllama_jax.train.config import MeshConfig, TrainConfig

STAGES = ("stage1", "stage2")  # a shipped config's name ends with its stage


@dataclasses.dataclass(frozen=True)
class Preset:
    """The mesh and the batch size for one slice or host, for models of 7B and 13B.

    Attributes:
        topology: The devices, as `vllama compile --topology` takes them.
        mesh: The mesh, whose axes multiply to the number of devices.
        rows: Rows of a batch on each device, by stage.
    """

    topology: str
    mesh: MeshConfig
    rows: dict[str, int]


def _preset(topology: str, data: int, fsdp: int, *rows: int) -> Preset:
    return Preset(topology, MeshConfig(data=data, fsdp=fsdp, tensor=1), dict(zip(STAGES, rows, strict=True)))


PRESETS = {
    "v5e-16": _preset("v5e:4x4", 1, 16, 32, 4),
    "v5e-64": _preset("v5e:8x8", 1, 64, 32, 4),
    "v5e-256": _preset("v5e:16x16", 4, 64, 32, 4),
    "v5p-64": _preset("v5p-64", 32, 1, 16, 8),
    "v5p-512": _preset("v5p-512", 256, 1, 16, 8),
    "v6e-256": _preset("v6e:16x16", 16, 16, 32, 8),
    "8xH100": _preset("H100:8", 8, 1, 32, 4),
    "8xH200": _preset("H200:8", 8, 1, 32, 4),
}


def find_preset(name: str) -> Preset:
    """Return the preset of a name.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in PRESETS:
        advice = suggest_name(name, PRESETS) or f"choose one of {', '.join(PRESETS)}"
        raise ConfigError(f"there is no preset {name!r}; {advice}")
    return PRESETS[name]


def apply_preset(config: TrainConfig, name: str, stage: str) -> TrainConfig:
    """Return a run config with the mesh and the batch size of a preset.

    Args:
        config: The run config.
        name: The name of the preset.
        stage: Whose rows to take: "stage1" for captions, "stage2" for instructions.

    Raises:
        ConfigError: There is no such preset.
    """
    preset = find_preset(name)
    batch_size = preset.rows[stage] * preset.mesh.data * preset.mesh.fsdp * config.grad_accum_steps
    return dataclasses.replace(config, mesh=preset.mesh, batch_size=batch_size)
