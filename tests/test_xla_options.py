"""XLA compiler options: by platform and program."""

import pytest

from vllama_jax.runtime.xla_options import XLA_OPTIONS, compiler_options


def test_options_of_tpu_programs():
    assert compiler_options("tpu", "train_step") == {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    assert compiler_options("tpu", "decode") == {"xla_tpu_enable_dot_strength_reduction": "false"}
    assert compiler_options("tpu", "prefill") == {}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("program", ["train_step", "prefill", "decode"])
def test_other_platforms_have_none(platform, program):
    """Their compilers reject options of the TPU compiler."""
    assert compiler_options(platform, program) == {}


def test_each_option_has_a_reason_with_a_figure():
    options = [option for programs in XLA_OPTIONS.values() for each in programs.values() for option in each]
    assert options
    for option in options:
        assert " ms" in option.reason
