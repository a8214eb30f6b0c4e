"""XLA's options for a step."""

import pytest

from fastft_jax.models.remat import resolve_policy
from fastft_jax.trainers.compile import compiler_options


@pytest.mark.parametrize("policy", ["offload", resolve_policy({"q": "offload"})], ids=str)
def test_copies_to_the_host_stay_out_of_cuda_graphs(policy):
    value = compiler_options(policy, "gpu")["xla_gpu_enable_command_buffer"]
    assert "CUBLAS" in value and "COPY" not in value
    assert compiler_options(policy, "cpu") == {}


@pytest.mark.parametrize("policy", ["none", "selective", "full", resolve_policy({"q": "save"})], ids=str)
def test_other_policies_leave_cuda_graphs_as_they_are(policy):
    assert "xla_gpu_enable_command_buffer" not in compiler_options(policy, "gpu")
