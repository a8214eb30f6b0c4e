"""NF4 decoding: the kernel against the reference, the reference against numpy, and the kernel's lowering for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from fastft_jax.pallas_kernels import nf4
from fastft_jax.pallas_kernels.nf4 import reference, triton

GROUPS = [5, 64, 300]  # below and at a multiple of one program's 32, above one scale's 256 and ragged


def operands(groups: int, double: bool):
    rng = np.random.default_rng(groups)
    codes = rng.integers(0, 256, (groups, 32), dtype=np.uint8)
    if not double:
        return codes, rng.uniform(0, 0.2, groups).astype(np.float32), None, None
    scale = rng.uniform(0, 0.1, -(-groups // 256)).astype(np.float32)
    return codes, rng.integers(0, 256, groups, dtype=np.uint8), scale, np.float32(0.07)


def in_numpy(codes, absmax, scale, offset):
    if scale is not None:
        absmax = nf4.dynamic_map()[absmax] * np.repeat(scale, 256)[: len(absmax)] + offset  # two float32 roundings
    return nf4.NF4_CODE[np.concatenate([codes >> 4, codes & 15], 1)] * absmax[:, None]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
def test_reference_equals_numpy_bit_for_bit_compiled_or_not(groups, double):
    args = operands(groups, double)
    compiled = jax.jit(lambda *a: reference.dequantize(*a, jnp.float32))
    expected = in_numpy(*args)
    assert np.array_equal(reference.dequantize(*args, jnp.float32), expected)
    assert np.array_equal(compiled(*args), expected)  # compiled code would fuse map * scale + offset if it were let


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("groups", GROUPS)
def test_kernel_interpreted_without_a_gpu_equals_the_reference_bit_for_bit(groups, dtype, double):
    args = operands(groups, double)
    kernel, expected = (
        jax.jit(lambda *a, i=implementation: nf4.dequantize(*a, dtype=dtype, implementation=i))(*args)
        for implementation in ("triton", "xla")
    )
    assert kernel.dtype == dtype
    assert np.array_equal(kernel, expected)


@pytest.mark.parametrize("double", [False, True])
def test_kernel_lowers_for_cuda_without_a_gpu(double):
    h200 = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=None)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=h200)
    shapes = [None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands(300, double)]
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda *a: triton.dequantize(*a, jnp.bfloat16, interpret=False)).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert ("nf4_dequantize_double" if double else "nf4_dequantize") in text


def test_kernel_refuses_arrays_beyond_its_32_bit_offsets():
    codes = jax.ShapeDtypeStruct((2**26, 32), jnp.uint8)
    absmax = jax.ShapeDtypeStruct((2**26,), jnp.float32)
    with pytest.raises(ValueError, match="2 GiB"):
        jax.eval_shape(lambda c, a: nf4.dequantize(c, a, dtype=jnp.bfloat16, implementation="triton"), codes, absmax)
    jax.eval_shape(lambda c, a: nf4.dequantize(c, a, dtype=jnp.bfloat16), codes, absmax)  # the reference takes them


def test_wrong_operands_are_named():
    codes, absmax, scale, offset = operands(300, True)
    with pytest.raises(ValueError, match="codes must be uint8"):
        nf4.dequantize(codes[:, :16], absmax, scale, offset, dtype=jnp.float32)
    with pytest.raises(ValueError, match="comes with a scale"):
        nf4.dequantize(codes, absmax, dtype=jnp.float32)
    with pytest.raises(ValueError, match="300 blocks need 2"):
        nf4.dequantize(codes, absmax, scale[:1], offset, dtype=jnp.float32)
    with pytest.raises(ValueError, match="unknown NF4 implementation"):
        nf4.dequantize(codes, absmax, scale, offset, dtype=jnp.float32, implementation="cuda")
