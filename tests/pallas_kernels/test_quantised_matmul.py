"""Few rows times NF4: interpreted kernels against a float64 product, their lowering for CUDA, what they refuse."""

import importlib.util

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from fastft_jax.pallas_kernels import nf4, pallas
from fastft_jax.pallas_kernels.quantised_matmul import jax_triton, quantised_matmul, supported, tiles, triton
from fastft_jax.pallas_kernels.quantised_matmul.cases import CASES


def operands(m: int, n: int, k: int, double: bool, dtype=jnp.bfloat16):
    rng = np.random.default_rng([m, n, k])
    groups = n * k // 64
    x = rng.standard_normal((m, k)).astype(dtype)
    codes = rng.integers(0, 256, (groups, 32), dtype=np.uint8)
    if not double:
        return x, codes, rng.uniform(0, 0.2, groups).astype(np.float32), None, None
    scale = rng.uniform(0, 0.1, -(-groups // 256)).astype(np.float32)
    return x, codes, rng.integers(0, 256, groups, dtype=np.uint8), scale, np.float32(0.07)


def weight_in_numpy(codes, absmax, scale, offset, shape):
    if scale is not None:
        absmax = nf4.dynamic_map()[absmax] * np.repeat(scale, 256)[: len(absmax)] + offset
    return (nf4.NF4_CODE[np.concatenate([codes >> 4, codes & 15], 1)] * absmax[:, None]).reshape(shape)


def relative_error(y, x, w):
    """Largest error of an output over the size of the sum that it is: sqrt(sum (x w)^2)."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    return np.max(np.abs(np.asarray(y, np.float64) - x @ w.T) / np.sqrt(x**2 @ (w**2).T))


def run(implementation, args, shape):
    return jax.jit(lambda *a: quantised_matmul(*a, shape=shape, implementation=implementation))(*args)


# 1 to 4 rows take one kernel, more another; 2,112 columns are 33 blocks, over one step and no multiple of any tile
@pytest.mark.parametrize("m, shape", [(1, (70, 2112)), (4, (5, 192)), (5, (70, 2112)), (37, (16, 192)), (64, (5, 64))])
def test_kernel_equals_the_float64_product(m, shape):
    args = operands(m, *shape, double=True)
    y = run("triton", args, shape)
    assert y.shape == (m, shape[0]) and y.dtype == jnp.bfloat16
    w = weight_in_numpy(*args[1:], shape)
    if m > 4:  # these round the weight to bfloat16 first, as the reference does
        w = w.astype(jnp.bfloat16)
    # half an ulp of bfloat16 is 2^-9 of a result, which is at most about four times the size it is compared with
    assert relative_error(y, args[0], w) < 2e-2


@given(
    m=st.sampled_from([1, 2, 7, 50]),
    n=st.integers(1, 40),
    blocks=st.integers(1, 9),
    double=st.booleans(),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float16]),
)
@settings(max_examples=4, deadline=None, derandomize=True)
def test_kernel_equals_the_reference_for_any_shape(m, n, blocks, double, dtype):
    shape = (n, 64 * blocks)
    args = operands(m, *shape, double, dtype)
    kernel, expected = (np.asarray(run(i, args, shape), np.float64) for i in ("triton", "xla"))
    # the last bit of each result, and up to 4 rows the reference's rounding of its weight
    size = np.abs(np.asarray(args[0], np.float64)) @ np.abs(weight_in_numpy(*args[1:], shape).astype(np.float64)).T
    assert np.all(np.abs(kernel - expected) <= 2 * float(jnp.finfo(dtype).eps) * size)


@pytest.mark.parametrize("m", [2, 8])
def test_every_code_meets_its_own_element_of_x(m):
    """x picks one column at a time: a permuted code, or one half of a byte taken for the other, is a wrong value."""
    shape = (16, 128)
    args = operands(m, *shape, double=False)
    w = weight_in_numpy(*args[1:], shape).astype(jnp.bfloat16)
    product = jax.jit(lambda x: quantised_matmul(x, *args[1:], shape=shape, implementation="triton"))
    for first in (0, 30, 64, 94, 126 - m, 128 - m):
        x = np.eye(128, dtype=jnp.bfloat16)[first : first + m]
        assert np.array_equal(product(x), w.T[first : first + m])


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("m", [1, 6])
def test_a_loop_reads_each_layer_of_a_stack(m, implementation):
    shape, layers = (70, 320), 3  # 350 blocks: two scales a layer
    rng = np.random.default_rng(m)
    x = rng.standard_normal((m, 320)).astype(jnp.bfloat16)
    codes = rng.integers(0, 256, (layers, 350, 32), dtype=np.uint8)
    absmax = rng.integers(0, 256, (layers, 350), dtype=np.uint8)
    weight = codes, absmax, rng.uniform(0, 0.1, (layers, 2)).astype(np.float32), np.float32([0.07, 0.08, 0.09])

    @jax.jit
    def products(x, *weight):
        f = lambda i: quantised_matmul(x, *weight, shape=shape, layer=i, implementation=implementation)  # noqa: E731
        return jax.lax.map(f, jnp.arange(layers))

    for layer, y in enumerate(products(x, *weight)):
        assert relative_error(y, x, weight_in_numpy(*(a[layer] for a in weight), shape)) < 2e-2


def test_leaving_the_matrix_does_not_leak_nan_or_infinity():
    shape = (9, 64)  # one block a row, of a step of four; rows 9.. of the tile do not exist
    x, codes, absmax, *_ = operands(5, *shape, double=False)
    x[3] = np.inf
    y = np.asarray(run("triton", (x, codes, absmax, None, None), shape), np.float32)
    assert np.isfinite(np.delete(y, 3, axis=0)).all()


def stacked(weight):
    return [None if a is None else a[None] for a in weight]


def lower_for_cuda(f, shapes):
    h200 = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=None)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=h200)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


ONE_OF_EACH = [case for case in CASES if case.name.endswith(("14336x4096", "1000x3584"))]


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)
def test_kernel_lowers_for_cuda_without_a_gpu(case):
    text = lower_for_cuda(lambda *a: case.run(*a, interpret=False), case.args)
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert ("quantised_matvec" if case.args[0].shape[0] <= 4 else "quantised_matmul") in text
    n = case.args[1].size // case.args[0].shape[1] * 2
    assert f"x{n}x{case.args[0].shape[1]}xbf16" not in text and f"tensor<{n}x{case.args[0].shape[1]}x" not in text


def test_a_float32_absmax_lowers_too():
    for m in (1, 16):
        args = [None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands(m, 100, 192, False)]
        f = lambda x, *a: triton.quantised_matmul(x, *stacked(a), shape=(100, 192), interpret=False)  # noqa: E731
        assert "__gpu$xla.gpu.triton" in lower_for_cuda(f, args)


@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is None, reason="needs the optional jax-triton")
@pytest.mark.parametrize("m", [1, 4, 16, 64])
@pytest.mark.parametrize("double", [False, True])
def test_raw_triton_kernels_compile_for_cuda_without_a_gpu(m, double):
    args = [None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands(m, 100, 192, double)]
    f = lambda x, *a: jax_triton.quantised_matmul(x, *stacked(a), shape=(100, 192), compute_capability=90)  # noqa: E731
    assert "triton_kernel_call" in lower_for_cuda(f, args)


def test_jax_triton_says_what_it_needs():
    args = operands(1, 8, 64, True)
    if importlib.util.find_spec("jax_triton") is None:
        with pytest.raises(ImportError, match="pip install jax-triton triton"):
            run("jax_triton", args, (8, 64))
    elif not pallas.on_gpu():
        with pytest.raises(ValueError, match="on a GPU only"):
            run("jax_triton", args, (8, 64))


def test_words_are_a_view_of_the_codes():
    codes = np.arange(4 * 32, dtype=np.uint8).reshape(1, 4, 32)
    assert np.array_equal(tiles.words(jnp.asarray(codes), 128), codes.view("<i4").reshape(2, 16))


def test_what_does_not_fit_is_refused_by_name():
    x, *weight = operands(2, 8, 128, True)
    with pytest.raises(ValueError, match="cannot multiply"):
        quantised_matmul(x[:, :64], *weight, shape=(8, 128))
    with pytest.raises(ValueError, match=r"codes \[16, 32\]"):
        quantised_matmul(x, weight[0][:8], *weight[1:], shape=(8, 128))
    with pytest.raises(ValueError, match="comes with a scale"):
        quantised_matmul(x, *weight[:2], shape=(8, 128))
    with pytest.raises(ValueError, match="16 blocks need 1"):
        quantised_matmul(x, *weight[:2], np.ones(2, np.float32), weight[3], shape=(8, 128))
    with pytest.raises(ValueError, match="unknown quantised_matmul implementation"):
        quantised_matmul(x, *weight, shape=(8, 128), implementation="cuda")
    for rows, dtype in ((65, jnp.bfloat16), (2, jnp.float32)):
        with pytest.raises(ValueError, match="1 to 64 rows of bfloat16 or float16"):
            quantised_matmul(jnp.zeros((rows, 128), dtype), *weight, shape=(8, 128), implementation="triton")
        assert quantised_matmul(jnp.zeros((rows, 128), dtype), *weight, shape=(8, 128)).shape == (rows, 8)


def test_supported_names_the_products_of_the_kernels():
    assert supported(1, (14336, 4096), jnp.bfloat16) and supported(64, (8, 64), jnp.float16)
    assert not supported(65, (8, 64), jnp.bfloat16) and not supported(1, (8, 96), jnp.bfloat16)
    assert not supported(1, (2**20, 4096), jnp.bfloat16) and not supported(1, (8, 64), jnp.float32)
