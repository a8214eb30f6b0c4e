"""NF4 decoding into a part of a buffer, scaled to the range of fp8 and transposed: exact, and nothing else touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_lowering import cuda_text, kernels

from fastft_jax.pallas_kernels import nf4
from fastft_jax.pallas_kernels.case import Case
from fastft_jax.pallas_kernels.nf4.cases import CASES

pytestmark = pytest.mark.usefixtures("quick_compilation")
E4M3 = jnp.float8_e4m3fn
# rows below, at and above a program's 128, ragged; columns of 1, 3 and 5 blocks, a program takes 4
SHAPES = [(5, 64), (130, 192), (256, 320)]


def stack(shape, double: bool, layers: int = 2):
    """Operands of `layers` matrices, and a factor that brings them to e4m3's range."""
    groups = shape[0] * shape[1] // 64
    rng = np.random.default_rng(groups)
    codes = rng.integers(0, 256, (layers, groups, 32), dtype=np.uint8)
    factor = jnp.float32(448 / 0.2)
    if not double:
        return (jnp.asarray(codes), jnp.asarray(rng.uniform(0, 0.2, (layers, groups)), jnp.float32), None, None), factor
    scale = rng.uniform(0, 0.1, (layers, -(-groups // 256)))
    absmax = rng.integers(0, 256, (layers, groups), dtype=np.uint8)
    return tuple(map(jnp.asarray, (codes, absmax, scale.astype(np.float32), np.float32([0.07, 0.09])))), factor


def reference(operands, layer: int, factor, shape, dtype) -> np.ndarray:
    one = [None if a is None else a[layer] for a in operands]
    w = nf4.dequantize(*one, factor, dtype=dtype, implementation="xla")
    return np.asarray(w).reshape(shape)


def same_bits(a, b) -> bool:
    a, b = (np.ascontiguousarray(np.asarray(x)) for x in (a, b))
    return a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_transpose_equal_the_reference_bit_for_bit(shape, scaled, double):
    operands, factor = stack(shape, double)
    factor, dtype = (factor, E4M3) if scaled else (None, jnp.bfloat16)
    n, k = shape
    expected = reference(operands, 1, factor, shape, dtype)

    buffer = jnp.full((n + 5, k + 64), jnp.nan, dtype)
    place = dict(shape=shape, size=buffer.shape, row=3, dtype=dtype)
    rows = np.asarray(nf4.decode_into(buffer, *operands, 1, factor, **place))
    assert same_bits(rows[3 : 3 + n, :k], expected)
    assert np.isnan(rows.astype(np.float32)).sum() == rows.size - expected.size  # the rest is left as it was

    buffer = jnp.full((k, n + 9), jnp.nan, dtype)
    place = dict(shape=shape, width=n + 9, column=7, dtype=dtype)
    columns = np.asarray(nf4.decode_transposed_into(buffer, *operands, 1, factor, **place))
    assert same_bits(columns[:, 7 : 7 + n].T, expected)
    assert np.isnan(columns.astype(np.float32)).sum() == columns.size - expected.size


def test_the_experts_of_a_layer_are_decoded_among_each_others_rows():
    """Two linears of three experts each, of layer 1 of 2: expert e's rows of the one, then of the other."""
    first, second = (stack(shape, True, layers=6)[0] for shape in ((5, 64), (7, 64)))
    place = dict(size=(36, 64), count=3, step=12, dtype=jnp.bfloat16)
    buffer = nf4.decode_into(None, *first, 3, shape=(5, 64), row=0, **place)
    buffer = nf4.decode_into(buffer, *second, 3, shape=(7, 64), row=5, **place)
    pairs = [(operands, 3 + e, n) for e in range(3) for operands, n in ((first, 5), (second, 7))]
    each = [reference(operands, matrix, None, (n, 64), jnp.bfloat16) for operands, matrix, n in pairs]
    assert same_bits(buffer, np.concatenate(each))
    with pytest.raises(ValueError, match="do not fit row 6"):
        nf4.decode_into(buffer, *second, 3, shape=(7, 64), row=6, **place)


def test_stacks_beyond_4_gib_are_read_with_64_bit_offsets():
    """Mixtral's: 32 layers of 8 experts, 7.5 GB of codes; in 2 to 4 GiB Pallas's offsets would be 32-bit and signed."""
    groups, spec = 14336 * 4096 // 64, jax.ShapeDtypeStruct
    args = spec((256, groups, 32), jnp.uint8), spec((256, groups), jnp.float32)
    place = dict(shape=(14336, 4096), size=(8 * 14336, 4096), row=0, count=8, step=14336, dtype=jnp.bfloat16)
    run = lambda c, a, interpret: nf4.decode_into(None, c, a, None, None, 8, **place, interpret=interpret)  # noqa: E731
    assert kernels(cuda_text(Case("stack", run, run, args, bytes=0))) == 1
    assert [nf4.in_reach(size) for size in (2**31 - 1, 2**31, 2**32, 2**32 + 1)] == [True, False, False, True]


def test_a_factor_multiplies_absmax_before_the_one_rounding():
    operands, factor = stack((130, 192), False)
    codes, absmax = np.asarray(operands[0][0]), np.asarray(operands[1][0])
    exact = nf4.NF4_CODE[np.concatenate([codes >> 4, codes & 15], 1)] * (absmax * np.float32(factor))[:, None]
    for implementation in ("xla", "triton"):
        w = nf4.dequantize(codes, absmax, factor=factor, dtype=E4M3, implementation=implementation)
        assert same_bits(w, exact.astype(E4M3))


def test_matrices_that_do_not_fit_the_buffer_are_refused():
    operands, _ = stack((130, 192), True)
    with pytest.raises(ValueError, match="columns 7 of 136"):
        nf4.decode_transposed_into(None, *operands, 0, shape=(130, 192), width=136, column=7, dtype=E4M3)
    with pytest.raises(ValueError, match="390 blocks"):
        nf4.decode_transposed_into(None, *operands, 0, shape=(130, 64), width=136, column=0, dtype=E4M3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_lowers_for_cuda_to_one_kernel(case):
    assert kernels(cuda_text(case)) == 1
