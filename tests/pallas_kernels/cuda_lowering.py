"""Lowering a kernel for an NVIDIA GPU on a machine that has none."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from fastft_jax.pallas_kernels.case import Case


def cuda_text(case: Case) -> str:
    """The StableHLO of a case's kernel as an H200 would get it."""
    h200 = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=None)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=h200)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda *args: case.run(*args, interpret=False)).trace(*case.args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def kernels(text: str) -> int:
    """How many Triton kernels a lowered program launches."""
    return text.count("__gpu$xla.gpu.triton")
