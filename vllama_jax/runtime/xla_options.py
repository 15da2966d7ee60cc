"""XLA compiler options by platform and program: the only place where the package sets them.

They are passed to `jax.jit` or `lower().compile()` as `compiler_options`, never through the environment, so that a
program on another platform does not see an option that its compiler rejects.
"""

import dataclasses
from typing import Literal, TypeAlias

Program: TypeAlias = Literal["train_step", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class XlaOption:
    """One compiler option.

    Attributes:
        name: As XLA spells it, without dashes.
        value: As XLA parses it.
        reason: What the option changes, and the figure behind it.
    """

    name: str
    value: str
    reason: str


# Figures: XLA's own cycle estimates, compiled ahead of time with libtpu 0.0.42 and JAX 0.10.2; not run on a TPU.
XLA_OPTIONS: dict[str, dict[Program, tuple[XlaOption, ...]]] = {
    "tpu": {
        "train_step": (
            XlaOption(
                "xla_jf_spmd_threshold_for_windowed_einsum_mib",
                "1000000",
                "Windowed einsum splits products with gathered weights into collective-permute loops. At fsdp 16 the "
                "ViT then takes 527 ms a step, and 150 ms without (7B stage 1, v5e:4x4, 4 rows per chip).",
            ),
        ),
        "decode": (
            XlaOption(
                "xla_tpu_enable_dot_strength_reduction",
                "false",
                "Strength reduction turns matrix-vector products into elementwise products and sums on the vector "
                "unit. At batch 1 a token then takes 13.1 ms, and 4.6 ms without (7B in bfloat16, v5e:2x2).",
            ),
        ),
    },
}


def compiler_options(platform: str, program: Program) -> dict[str, str]:
    """Return the compiler options of a program, as `jax.jit(compiler_options=…)` takes them.

    Args:
        platform: As `jax.default_backend()` names it: "cpu", "gpu" or "tpu".
        program: What is compiled.

    Returns:
        Values by option name; empty where the platform needs none.
    """
    options = XLA_OPTIONS.get(platform, {}).get(program, ())
    return {option.name: option.value for option in options}
