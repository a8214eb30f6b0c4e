"""fp8 on a real card: kernels against their references, cuBLASLt's product against float64, the whole linear."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastft_jax.models.residuals import Keep
from fastft_jax.pallas_kernels import fp8, nf4
from fastft_jax.pallas_kernels.nf4.cases import CASES as NF4_CASES
from fastft_jax.pallas_kernels.pallas import current_device
from fastft_jax.pallas_kernels.rms_norm import rms_norm
from fastft_jax.quant.fp8_mlp import fp8_mlp
from fastft_jax.quant.glu_linear import glu_linear
from fastft_jax.quant.lora_linear import Projection, lora_linear
from fastft_jax.quant.nf4 import dequantize, quantize
from fastft_jax.quant.norm_linear import Norm, norm_linear

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


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("m, f, r", [(37, 192, 0), (333, 3584, 32), (512, 1000, 48)])
def test_glu_between_products_equals_the_reference_from_a_stack(m, f, r, activation):
    room, keys = -(-2 * r // 64) * 64, jax.random.split(jax.random.key(0), 8)
    normal = lambda i, *shape: jax.random.normal(keys[i], shape, jnp.bfloat16)  # noqa: E731
    scales = jnp.abs(jax.random.normal(keys[7], (2, m), jnp.float32)) / 300
    gate_up, d_act = fp8.Scaled(300 * normal(0, 3, m, 2 * f), scales[0]), fp8.Scaled(300 * normal(1, m, f), scales[1])
    ranks = None
    if r:
        b = normal(3, 2 * f, room).at[:f, r:].set(0).at[f:, :r].set(0).at[:, 2 * r :].set(0)
        gate_up = gate_up._replace(h=normal(2, m, room), b=b)
        d_act = d_act._replace(h=normal(4, m, 64), b=normal(5, f, 64).at[:, r:].set(0))
        ranks = ((0, r), (r, 2 * r), (0, r))

    def run(implementation):
        options = dict(dtype=jnp.bfloat16, activation=activation, implementation=implementation)

        def both(gate_up, d_act, index):
            act = fp8.rescale_glu(gate_up, ranks=ranks and ranks[:2], index=index, **options)
            return act, *fp8.rescale_glu_backward(gate_up, d_act, ranks=ranks, index=index, **options)

        return jax.jit(both)(gate_up, d_act, jnp.int32(2))

    kernel, plain = run("triton"), run("xla")
    assert np.array_equal(float64(kernel[0]), float64(kernel[2]))
    for a, b in zip(kernel, plain, strict=True):
        # the reference is one fusion and may leave out roundings to bfloat16 on the way: 1.7e-3 each
        assert relative(a, float64(b)) < 6e-3


@pytest.mark.parametrize("m, d, room", [(37, 3584, 64), (333, 4096, 0), (64, 16384, 64)])
def test_a_norm_gives_its_rows_in_8_bits_as_well(m, d, room):
    x = jax.random.normal(jax.random.key(0), (m, d), jnp.bfloat16)
    weight = 1 + jax.random.normal(jax.random.key(1), (d,), jnp.bfloat16) / 8
    norm = dict(eps=1e-5, room=room, implementation="triton")
    y, y8, scale = jax.jit(lambda x, w: fp8.rms_norm_rows(x, w, **norm))(x, weight)
    plain = float64(jax.jit(lambda x, w: rms_norm(x, w, **norm))(x, weight))
    # two kernels may sum a row in another order: an ulp before the weight, another after it
    np.testing.assert_allclose(float64(y), plain, rtol=2.0**-6)
    expected8, expected = jax.jit(lambda y: fp8.quantise_rows(y, columns=d, implementation="triton"))(y)
    np.testing.assert_allclose(scale, expected, rtol=1e-6)
    assert relative(y8, float64(expected8)) < 2e-3  # a GPU divides to 2 ulp, as above


def test_a_feed_forward_layer_as_one_op_is_close_to_its_halves():
    d, f, m, scalings = 512, 1536, 333, (1.0, 0.5, 0.7)
    members = []
    for i, (n, k) in enumerate(((f, d), (f, d), (d, f))):
        w = dataclasses.replace(quantize(jax.random.normal(jax.random.key(i), (n, k)) / k**0.5), compute="fp8")
        a = jax.random.normal(jax.random.key(10 + i), (8, k)) / k**0.5
        members.append(Projection(w, a, 0.3 * jax.random.normal(jax.random.key(20 + i), (n, 8))))
    x, dy, d_residual = (jax.random.normal(jax.random.key(30 + i), (m, d), jnp.bfloat16) for i in range(3))
    weight, norm = jnp.ones(d, jnp.bfloat16), Norm(1e-5)

    def halves(x, members):
        gate_up, x = norm_linear(x, weight, norm, members[:2], scalings[:2])
        return glu_linear(gate_up, members[2], scalings[2]), x

    def run(f):
        def both(x, pairs, cotangents):
            here = lambda x, pairs: f(x, [Projection(p.weight, *ab) for p, ab in zip(members, pairs, strict=True)])  # noqa: E731
            y, pull = jax.vjp(here, x, pairs)
            return y, pull(cotangents)

        return jax.tree.leaves(jax.jit(both)(x, [(p.a, p.b) for p in members], (dy, d_residual)))

    one, apart = run(lambda x, p: fp8_mlp(x, weight, norm, p, scalings, Keep())), run(halves)
    for a, b in zip(one, apart, strict=True):
        assert relative(a, float64(b)) < 0.03  # a bfloat16 that rounds otherwise moves few e4m3 values, each by 9%


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
