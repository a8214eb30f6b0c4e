"""Linears whose base product runs in fp8: exactly the quantisation they say, close to bfloat16, adapters untouched."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_jax.pallas_kernels import pallas
from fastft_jax.quant import fp8, nf4
from fastft_jax.quant.glu_linear import glu_linear
from fastft_jax.quant.lora_linear import Projection, lora_linear
from fastft_jax.quant.norm_linear import Norm, norm_linear

pytestmark = pytest.mark.usefixtures("quick_compilation")

E4M3 = ml_dtypes.float8_e4m3fn
quantize = jax.jit(nf4.quantize, static_argnames="double_quant")


def float64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def member(rng, n: int, k: int, r: int | None, double_quant: bool = True) -> Projection:
    w = dataclasses.replace(quantize(0.02 * normal(rng, n, k), double_quant=double_quant), compute="fp8")
    return Projection(w) if r is None else Projection(w, normal(rng, r, k) / k**0.5, 0.1 * normal(rng, n, r))


def in_bfloat16(projections):
    return [p._replace(weight=dataclasses.replace(p.weight, compute=None)) for p in projections]


def rounded_rows(x) -> np.ndarray:
    """Each row rounded to e4m3 by its largest magnitude, and scaled back."""
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(448)
    return (x / scale).astype(E4M3).astype(np.float64) * scale


def rounded_weight(projections) -> np.ndarray:
    """All weights side by side, rounded to e4m3 by one scale: the largest absmax, as its scales bound it."""
    bounds = [
        np.max(p.weight.absmax)
        if p.weight.absmax_scale is None
        else np.max(p.weight.absmax_scale) + p.weight.absmax_offset
        for p in projections
    ]
    scale = np.float32(max(bounds)) / np.float32(448)
    w = np.concatenate([nf4.dequantize(p.weight, jnp.float32) for p in projections])
    return (w / scale).astype(E4M3).astype(np.float64) * scale


def vjp(projections, scalings, x, dy):
    def run(x, pairs):
        return lora_linear(x, [Projection(p.weight, *ab) for p, ab in zip(projections, pairs, strict=True)], scalings)

    y, pull_back = jax.vjp(run, x, [(p.a, p.b) for p in projections])
    return y, *pull_back(dy)


def cosine(a, b) -> float:
    a, b = float64(a).ravel(), float64(b).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 99),
    k=st.sampled_from([40, 64, 128]),
    widths=st.lists(st.sampled_from([24, 40, 96]), min_size=1, max_size=3),
    double_quant=st.booleans(),
    data=st.data(),
)
def test_values_and_gradients_are_those_of_the_quantised_factors_in_float64(seed, k, widths, double_quant, data):
    ranks = [data.draw(st.sampled_from([None, 4])) for _ in widths]
    scalings = [data.draw(st.sampled_from([1.0, 0.7])) for _ in widths]
    rng = np.random.default_rng(seed)
    projections = [member(rng, n, k, r, double_quant) for n, r in zip(widths, ranks, strict=True)]
    x, dy = normal(rng, 5, k), normal(rng, 5, sum(widths))
    y, dx, pairs = vjp(projections, scalings, x, dy)

    w = rounded_weight(projections)
    true_y, true_dx = rounded_rows(x) @ w.T, rounded_rows(dy) @ w
    first = 0
    for p, s in zip(projections, scalings, strict=True):
        at = slice(first, first := first + p.weight.shape[0])
        if p.a is not None:
            true_y[:, at] += s * float64(x) @ float64(p.a).T @ float64(p.b).T
            true_dx += s * float64(dy)[:, at] @ float64(p.b) @ float64(p.a)
    # float32 sums; and where x / s is within a rounding of the middle of two e4m3 values, another one may be taken,
    # which moves one product of the sum: 2**-4 of 0.02, 3 (dy) and about 1
    np.testing.assert_allclose(y, true_y, rtol=1e-5, atol=4e-3)
    np.testing.assert_allclose(dx, true_dx, rtol=1e-5, atol=4e-3)
    off = [np.abs(float64(a) - b) for a, b in ((y, true_y), (dx, true_dx))]
    assert max(np.median(o) for o in off) < 1e-6

    _, _, plain = vjp(in_bfloat16(projections), scalings, x, dy)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), pairs, plain)  # A and B never see fp8


def test_close_to_bfloat16_on_random_data():
    rng = np.random.default_rng(1)
    projections = [member(rng, n, 256, 8) for n in (128, 64, 64)]
    x, dy = (normal(rng, 64, n).astype(jnp.bfloat16) for n in (256, 256))
    ours = jax.tree.leaves(vjp(projections, [1.0] * 3, x, dy))
    plain = jax.tree.leaves(vjp(in_bfloat16(projections), [1.0] * 3, x, dy))
    assert ours[0].dtype == ours[1].dtype == jnp.bfloat16
    for a, b in zip(ours, plain, strict=True):
        assert cosine(a, b) > 0.999  # two factors with errors of 2.6% (uniform within half a step of 2**-3): 0.9993
    assert cosine(ours[0], plain[0]) < 0.99999  # and yet it is fp8


@pytest.mark.parametrize("rank", [None, 4])
def test_behind_a_norm_and_a_glu_it_is_the_same_product(rank):
    rng = np.random.default_rng(2)
    p, weight, x, dy = member(rng, 24, 64, rank), 1 + 0.1 * normal(rng, 64), normal(rng, 6, 64), normal(rng, 6, 24)
    norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight  # noqa: E731
    act = lambda gate_up: jax.nn.silu(gate_up[:, :64]) * gate_up[:, 64:]  # noqa: E731
    pairs = (
        (lambda x: norm_linear(x, weight, Norm(1e-5), [p], [0.7])[0], lambda x: lora_linear(norm(x), [p], [0.7]), x),
        (lambda u: glu_linear(u, p, 0.7), lambda u: lora_linear(act(u), [p], [0.7]), normal(rng, 6, 128)),
    )
    for fused, apart, argument in pairs:
        (y, pull), (expected, pull_expected) = jax.vjp(fused, argument), jax.vjp(apart, argument)
        # what they quantise differs in the last bit of float32, so that a few e4m3 values may be neighbours
        np.testing.assert_allclose(y, expected, atol=4e-3)
        np.testing.assert_allclose(*pull(dy), *pull_expected(dy), atol=4e-3)


def test_a_group_runs_in_fp8_only_if_all_of_it_says_so():
    rng = np.random.default_rng(3)
    projections, x = [member(rng, n, 64, None) for n in (24, 40)], normal(rng, 5, 64)
    plain = lora_linear(x, in_bfloat16(projections), [1.0, 1.0])
    mixed = [projections[0], *in_bfloat16(projections[1:])]
    assert np.array_equal(lora_linear(x, mixed, [1.0, 1.0]), plain)
    dense = Projection(nf4.dequantize(projections[1].weight, jnp.float32))
    np.testing.assert_allclose(lora_linear(x, [projections[0], dense], [1.0, 1.0]), plain, rtol=1e-5, atol=1e-5)
    assert not np.allclose(lora_linear(x, projections, [1.0, 1.0]), plain, rtol=1e-4)


def test_the_bound_of_a_matrix_is_its_largest_weight_or_little_more():
    rng = np.random.default_rng(4)
    stack = nf4.stack([quantize(s * normal(rng, 256, 128)) for s in (0.02, 0.05)])
    for layer in range(2):
        w = stack.at(jnp.int32(layer))
        largest = float(np.abs(nf4.dequantize(w, jnp.float32)).max())
        assert largest <= float(fp8._absmax(w)) <= 1.5 * largest


def test_the_kernels_give_what_the_reference_gives(monkeypatch):
    """As on a GPU, but interpreted: buffers shared by a group, the transpose, padding of the adapters' columns.

    70 rows: with up to 64 a GPU reads NF4 directly.
    """
    rng = np.random.default_rng(5)
    projections = [member(rng, n, 128, r) for n, r in ((40, 2), (24, None), (64, 70))]
    two = [nf4.stack([p.weight, p.weight]).at(jnp.int32(1)) for p in projections]
    projections = [p._replace(weight=w) for p, w in zip(projections, two, strict=True)]
    x, dy = (normal(rng, 70, n).astype(jnp.bfloat16) for n in (128, 128))
    plain = vjp(projections, [1.0] * 3, x, dy)

    call = pallas.call
    monkeypatch.setattr(pallas, "call", lambda *a, **options: call(*a, **options | {"interpret": True}))

    def matmul(x8, w8, dtype):
        return (x8.astype(jnp.float32) @ w8.astype(jnp.float32).T).astype(dtype)

    monkeypatch.setattr(fp8.fp8, "matmul", matmul)  # a CPU has no fp8 product
    monkeypatch.setattr(pallas, "on_gpu", lambda: True)
    kernels = vjp(projections, [1.0] * 3, x, dy)
    for a, b in zip(jax.tree.leaves(kernels), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(float64(a), float64(b), rtol=2**-7, atol=2e-3)  # two bfloat16 roundings
