"""fp8 on a real card: kernels against their references, cuBLASLt's product against float64, the whole linear."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastft_jax.pallas_kernels import fp8, nf4
from fastft_jax.pallas_kernels.attention import current_device
from fastft_jax.pallas_kernels.nf4.cases import CASES as NF4_CASES
from fastft_jax.quant.lora_linear import Projection, lora_linear
from fastft_jax.quant.nf4 import dequantize, quantize

pytestmark = pytest.mark.gpu
E4M3 = jnp.float8_e4m3fn


@pytest.fixture(scope="module", autouse=True)
def needs_a_gpu_with_fp8():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    if current_device()[1] < (8, 9):
        pytest.skip("needs compute capability 8.9")


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def relative(got, exact) -> float:
    return float(np.linalg.norm(float64(got) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("m, k, unread", [(1, 64, 0), (37, 3584, 64), (33, 28672, 0)])
def test_quantised_rows_equal_the_references(m, k, unread, format):
    x = jax.random.normal(jax.random.key(0), (m, k + unread), jnp.bfloat16)
    (x8, scale), (plain8, plain) = (
        jax.jit(lambda x, i=i: fp8.quantise_rows(x, columns=k, format=format, implementation=i))(x)
        for i in ("triton", "xla")
    )
    np.testing.assert_allclose(scale, plain, rtol=1e-6)
    # a GPU divides to 2 ulp: what lies at the middle of two 8-bit values may go either way, by one code
    off = np.abs(np.asarray(x8).view(np.uint8).astype(int) - np.asarray(plain8).view(np.uint8).astype(int))
    assert off.max() <= 1 and (off > 0).mean() < 1e-3


@pytest.mark.parametrize(
    "case", [c for c in NF4_CASES if "1000x3584" in c.name or "1024x4096" in c.name], ids=lambda case: case.name
)
def test_decoding_for_fp8_equals_the_reference_bit_for_bit(case):
    operands = [jnp.asarray(a) for a in case.draw(0)]
    got, expected = (np.ascontiguousarray(jax.jit(f)(*operands)).view(np.uint8) for f in (case.run, case.reference))
    assert np.array_equal(got, expected)


def test_a_group_is_decoded_side_by_side_and_transposed():
    shapes, k = (200, 64, 130), 3584
    weights = [quantize(0.02 * jax.random.normal(jax.random.key(n), (n, k))) for n in shapes]
    factor = jnp.float32(448 / 0.12)
    expected = np.concatenate([dequantize(w, E4M3, factor, implementation="xla") for w in weights])

    @jax.jit
    def decode():
        rows, columns, at = None, None, 0
        for w in weights:
            rows = nf4.decode_into(rows, *w.in_stack(), factor, shape=w.shape, size=expected.shape, row=at, dtype=E4M3)
            columns = nf4.decode_transposed_into(
                columns, *w.in_stack(), factor, shape=w.shape, width=len(expected), column=at, dtype=E4M3
            )
            at += w.shape[0]
        return rows, columns

    rows, columns = decode()
    assert np.array_equal(np.asarray(rows).view(np.uint8), expected.view(np.uint8))
    assert np.array_equal(np.ascontiguousarray(np.asarray(columns).T).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("m, n, k", [(37, 200, 3584), (512, 6144, 4096)])
def test_the_product_is_right_within_its_accumulator(m, n, k):
    x8, w8 = (fp8.quantise_rows(jax.random.normal(jax.random.key(i), (rows, k)))[0] for i, rows in enumerate((m, n)))
    exact = float64(x8) @ float64(w8).T
    assert relative(jax.jit(fp8.matmul)(x8, w8), exact) < 4e-3  # rounding to bfloat16: 1.7e-3; the rest 14-bit sums
    text = jax.jit(fp8.matmul).lower(x8, w8).compile().as_text()
    assert "__cublas$lt$matmul$f8" in text and "triton" not in text


@pytest.mark.parametrize("m, n, r", [(37, 200, 64), (333, 3584, 128)])
def test_rescaling_and_a_low_rank_product_equal_float64(m, n, r):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((m, n), (m,), (m, r), (n, r))
    sums, scale, h, b = (jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=True))
    scale = scale.astype(jnp.float32)
    exact = float64(sums) * float64(scale)[:, None] + float64(h) @ float64(b).T
    y = jax.jit(lambda *a: fp8.rescale_add(*a, implementation="triton"))(sums, scale, h, b)
    assert relative(y, exact) < 2.5e-3  # one rounding to bfloat16: 1.7e-3


def test_a_linear_and_its_gradients_are_close_to_bfloat16():
    k, shapes = 1024, (512, 256, 256)
    weights = [quantize(0.02 * jax.random.normal(jax.random.key(n), (n, k))) for n in shapes]
    pairs = [(jax.random.normal(jax.random.key(1), (8, k)) / 32, jnp.full((n, 8), 0.05)) for n in shapes]
    x, dy = (jax.random.normal(jax.random.key(i), (333, 1024), jnp.bfloat16) for i in (2, 3))

    def run(compute):
        ps = [dataclasses.replace(w, compute=compute) for w in weights]
        f = lambda x, pairs: lora_linear(x, [Projection(w, *ab) for w, ab in zip(ps, pairs, strict=True)], [1.0] * 3)  # noqa: E731
        return jax.jit(lambda x, pairs, dy: (lambda y, pull: (y, pull(dy)))(*jax.vjp(f, x, pairs)))(x, pairs, dy)

    for a, b in zip(*(jax.tree.leaves(run(compute)) for compute in ("fp8", None)), strict=True):
        assert relative(a, float64(b)) < 0.05  # two factors with 2.6% each: 3.7%
