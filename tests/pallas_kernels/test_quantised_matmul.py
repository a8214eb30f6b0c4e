"""Few rows times NF4: interpreted kernels against a float64 product, their lowering for CUDA, what they refuse."""

import importlib.util
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from fastft_jax.pallas_kernels import nf4, pallas
from fastft_jax.pallas_kernels.quantised_matmul import (
    fixed_point,
    jax_triton,
    quantised_matmul,
    supported,
    tiles,
    triton,
)
from fastft_jax.pallas_kernels.quantised_matmul.cases import CASES

pytestmark = pytest.mark.usefixtures("quick_compilation")
PTX = fixed_point.multiply_asm(split_low=False)


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
        y, expected = (np.asarray(a, np.float32) for a in (product(x), w.T[first : first + m]))
        # up to 4 rows a weight is right to 1.5e-4 before it is rounded: now and then it is rounded to the neighbour
        assert np.all(np.abs(y - expected) <= (2**-7 * np.abs(expected) if m <= 4 else 0))


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


def test_few_rows_err_less_than_a_weight_rounded_to_bfloat16():
    """Without the rounding of the result, which hides it: float16 results of a weight that both paths hold."""
    shape = (64, 1024)
    args = operands(2, *shape, double=False, dtype=jnp.float16)
    w = weight_in_numpy(*args[1:], shape).astype(np.float64)
    exact = np.asarray(args[0], np.float64) @ w.T
    rounded = np.asarray(args[0], np.float64) @ w.astype(jnp.bfloat16).astype(np.float64).T
    error = np.linalg.norm(np.asarray(run("triton", args, shape), np.float64) - exact)
    assert error < np.linalg.norm(rounded - exact) / 4


@pytest.mark.parametrize("spread", [1e-30, 1.0, 1e30])
def test_x_of_any_size_keeps_its_precision(spread):
    """Each half block has its own step: an outlier costs its neighbours precision, and no one else."""
    shape = (8, 256)
    args = operands(2, *shape, double=False)
    x = (np.asarray(args[0], np.float32) * spread).astype(jnp.bfloat16)
    x[0, 16:48] = 0  # a half block's step would be 0 / 0
    x[1, 70] *= 500
    w = weight_in_numpy(*args[1:], shape).astype(np.float64)
    y = np.asarray(run("triton", (x, *args[1:]), shape), np.float64)
    exact = x.astype(np.float64) @ w.T
    assert np.all(np.abs(y - exact) <= 6e-3 * np.sqrt(x.astype(np.float64) ** 2 @ (w**2).T) * 4)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_fixed_point_is_the_product_of_codebook_and_x(seed, word):
    """The integers that both the PTX and its interpretation compute, against the codebook in float64."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-fixed_point.X_LEVELS, fixed_point.X_LEVELS + 1, (1, 32)).astype(np.int32)
    high, low = (np.asarray(part, np.int32) for part in fixed_point.split_x(values))
    assert high.min() >= -127 and high.max() <= 127 and low.min() >= -64 and low.max() <= 63
    planes = [part.astype(np.int8).reshape(8, 4).view("<i4") for part in (high, low)]
    words = np.uint32([word, *rng.integers(0, 2**32, 3)]).view(np.int32).reshape(4, 1, 1)
    x = [jnp.asarray(plane[i]).reshape(1, 1) for plane in planes for i in range(8)]
    bias = jnp.asarray(fixed_point.bias(values)).reshape(1, 1)
    total = fixed_point.multiply([*jnp.asarray(words)], x, bias, [], split_low=False, interpret=True)
    codes = words.view(np.uint32).reshape(4, 1) >> np.arange(0, 32, 4, np.uint32) & 15
    exact = np.sum(nf4.NF4_CODE.astype(np.float64)[codes].reshape(-1) * values[0])
    unit = fixed_point.TOTAL_UNIT * fixed_point.X_LEVELS
    # 32 times a codebook's rounding and a product of low bytes
    assert abs(int(total[0, 0]) * unit - exact) < 32 * (5e-5 * fixed_point.X_LEVELS + 127 * 64 / 7854)


def test_prmt_picks_every_code():
    """The look-up as the PTX manual describes it, on a machine that has none: bytes of two registers, sign if bit 3."""
    for byte, expected in enumerate((fixed_point.LEVELS >> 7, fixed_point.LEVELS & 127)):
        for code in range(16):
            found = 0
            for half, nibble in ((0, code), (1, code ^ 8)):
                table = fixed_point.TABLE[2 * byte + half].tobytes()
                constant = re.findall(rf"prmt.b32 [hl]{half}, \${22 + 2 * byte + half}, (\d+)", PTX)[0]
                picked = (table + int(constant).to_bytes(4, "little"))[nibble & 7]
                found |= (0xFF if picked & 0x80 else 0) if nibble & 8 else picked
            assert found == expected[code]


def test_leaving_the_matrix_does_not_leak_nan_or_infinity():
    shape = (9, 64)  # one block a row, of a step of four; rows 9.. of the tile do not exist
    x, codes, absmax, *_ = operands(5, *shape, double=False)
    x[3] = np.inf
    y = np.asarray(run("triton", (x, codes, absmax, None, None), shape), np.float32)
    assert np.isfinite(np.delete(y, 3, axis=0)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_in_few_rows_stay_visible_in_their_row(bad):
    shape = (8, 256)
    x, *weight = operands(2, *shape, double=False)
    x[1, 200] = bad
    y = np.asarray(run("triton", (x, *weight), shape), np.float32)
    assert np.isfinite(y[0]).all() and not np.isfinite(y[1]).any()


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
    few = case.args[0].shape[0] <= 4  # a kernel of its own brings their x into fixed point
    assert text.count("__gpu$xla.gpu.triton") == (2 if few else 1)
    assert ("quantised_matvec" if few else "quantised_matmul") in text and ("prmt.b32" in text) == few
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
