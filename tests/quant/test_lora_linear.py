"""Linears with frozen weights and LoRA pairs, alone, in groups and behind a GLU: values, gradients, what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_jax.pallas_kernels.glu import glu
from fastft_jax.pallas_kernels.rms_norm import rms_norm
from fastft_jax.quant import nf4
from fastft_jax.quant.glu_linear import glu_linear
from fastft_jax.quant.lora_linear import Projection, lora_linear, room_of
from fastft_jax.quant.norm_linear import Norm, norm_linear

pytestmark = pytest.mark.usefixtures("quick_compilation")
quantize = jax.jit(nf4.quantize)
dequantize = jax.jit(nf4.dequantize, static_argnums=1)


def float64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def member(rng, n: int, k: int, r: int | None, kind: str) -> Projection:
    w = normal(rng, n, k)
    w = quantize(w) if kind == "nf4" else w
    return Projection(w) if r is None else Projection(w, normal(rng, r, k), normal(rng, n, r))


def dense(p: Projection) -> np.ndarray:
    return float64(dequantize(p.weight, jnp.float32) if isinstance(p.weight, nf4.NF4Array) else p.weight)


def in_float64(x, dy, projections, scalings):
    """y, dx and each (dA, dB), from the definition."""
    x, dy = float64(x).reshape(-1, x.shape[-1]), float64(dy).reshape(-1, dy.shape[-1])
    ys, dx, pairs, first = [], 0.0, [], 0
    for p, s in zip(projections, scalings, strict=True):
        w = dense(p)
        d = dy[:, first : first + len(w)]
        first += len(w)
        y, dx = x @ w.T, dx + d @ w
        if p.a is None:
            pairs.append(None)
        else:
            a, b = float64(p.a), float64(p.b)
            y, dx = y + s * x @ a.T @ b.T, dx + s * d @ b @ a
            pairs.append((s * (d @ b).T @ x, s * d.T @ (x @ a.T)))
        ys.append(y)
    return np.concatenate(ys, axis=1), dx, pairs


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99),
    kind=st.sampled_from(["nf4", "dense"]),
    k=st.sampled_from([40, 64]),
    widths=st.lists(st.sampled_from([24, 40, 96]), min_size=1, max_size=3),
    data=st.data(),
)
def test_a_group_and_its_gradients_equal_float64_numpy(seed, kind, k, widths, data):
    ranks = [data.draw(st.sampled_from([None, 1, 4, 70])) for _ in widths]
    scalings = [data.draw(st.sampled_from([1.0, 0.7])) for _ in widths]
    rng = np.random.default_rng(seed)
    projections = [member(rng, n, k, r, kind) for n, r in zip(widths, ranks, strict=True)]
    x, dy = normal(rng, 2, 3, k), normal(rng, 2, 3, sum(widths))
    pairs = [(p.a, p.b) for p in projections]

    def run(x, pairs):
        return lora_linear(x, [Projection(p.weight, *ab) for p, ab in zip(projections, pairs, strict=True)], scalings)

    y, pull_back = jax.vjp(run, x, pairs)
    dx, d_pairs = pull_back(dy)
    true_y, true_dx, true_pairs = in_float64(x, dy, projections, scalings)
    # float32 sums of up to 96 + 70 products; the largest partial sums are in the hundreds (70 ranks): 1e-7 of that each
    close = lambda ours, true: np.testing.assert_allclose(float64(ours).reshape(true.shape), true, 1e-4, 2e-3)  # noqa: E731
    close(y, true_y)
    close(dx, true_dx)
    for ours, true in zip(d_pairs, true_pairs, strict=True):
        for one, expected in zip(ours, true or (), strict=False):
            close(one, expected)


def test_bfloat16_base_product_is_the_float32_one_rounded_once():
    rng = np.random.default_rng(0)
    p = member(rng, 24, 40, None, "nf4")
    x, dy = (normal(rng, 2, 3, n).astype(jnp.bfloat16) for n in (40, 24))
    w = float64(dequantize(p.weight, jnp.bfloat16))
    y, pull_back = jax.vjp(lambda x: lora_linear(x, [p], [1.0]), x)
    (dx,) = pull_back(dy)
    assert y.dtype == dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(float64(y), float64(x) @ w.T, rtol=2**-8, atol=1e-4)  # half an ulp is 2**-9
    np.testing.assert_allclose(float64(dx), float64(dy) @ w, rtol=2**-8, atol=1e-4)


def test_bfloat16_adapter_is_added_before_the_one_rounding():
    # 256 from the base and 1.25 from the adapter; above 256 bfloat16 counts in twos
    x = jnp.ones((1, 256), jnp.bfloat16)
    p = Projection(jnp.ones((1, 256)), jnp.full((1, 256), 2.0**-8), jnp.full((1, 1), 1.25))
    assert float(lora_linear(x, [p], [1.0])[0, 0]) == 258.0  # 257.25 to the nearest even multiple of 2


def test_bfloat16_adapter_gradients_are_accumulated_beyond_bfloat16():
    # 4096 equal contributions of 1 to every entry: a bfloat16 accumulator would stop at 256
    x, a, b = jnp.ones((4096, 8), jnp.bfloat16), jnp.full((1, 8), 0.125), jnp.ones((3, 1))
    _, pull_back = jax.vjp(lambda a, b: lora_linear(x, [Projection(jnp.zeros((3, 8)), a, b)], [1.0]), a, b)
    da, db = pull_back(jnp.ones((4096, 3), jnp.bfloat16))
    assert da.dtype == db.dtype == jnp.float32
    assert np.all(np.asarray(db) == 4096) and np.all(np.asarray(da) == 3 * 4096)


def test_dropped_inputs_feed_the_adapters_alone():
    rng = np.random.default_rng(3)
    ps = [member(rng, n, 40, r, "nf4") for n, r in ((24, 4), (8, None), (16, 2))]
    x, dy = normal(rng, 5, 40), normal(rng, 5, 48)
    drops = [normal(rng, 5, 40), None, normal(rng, 5, 40)]

    def ours(x, drops, pairs):
        return lora_linear(x, [Projection(p.weight, *ab) for p, ab in zip(ps, pairs, strict=True)], [0.5] * 3, drops)

    def plain(x, drops, pairs):
        out = []
        for p, u, (a, b) in zip(ps, drops, pairs, strict=True):
            y = x @ jnp.asarray(dense(p), jnp.float32).T
            out.append(y if a is None else y + 0.5 * (u @ a.T) @ b.T)
        return jnp.concatenate(out, axis=1)

    args = (x, drops, [(p.a, p.b) for p in ps])
    (y, pull), (expected, pull_expected) = jax.vjp(ours, *args), jax.vjp(plain, *args)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), pull(dy), pull_expected(dy))


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("stacked", [False, True])
def test_glu_linear_is_lora_linear_of_glu(stacked, rank):
    rng = np.random.default_rng(4)
    p = member(rng, 24, 40, rank, "nf4")
    gate_up, dy = normal(rng, 2, 3, 80), normal(rng, 2, 3, 24)
    stack = jnp.stack([gate_up + 1, gate_up, gate_up - 1]) if stacked else None

    def ours(gate_up, a, b):
        where = dict(stack=stack, index=jnp.int32(1)) if stacked else {}
        return glu_linear(gate_up, Projection(p.weight, a, b), 0.7, **where)

    def apart(gate_up, a, b):
        return lora_linear(glu(gate_up, implementation="xla"), [Projection(p.weight, a, b)], [0.7])

    (y, pull), (expected, pull_expected) = (jax.vjp(f, gate_up, p.a, p.b) for f in (ours, apart))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), pull(dy), pull_expected(dy))


@pytest.mark.parametrize("ranks", [(4, None), (None, None)])
def test_norm_linear_is_lora_linear_of_rms_norm_and_passes_x_on(ranks):
    rng = np.random.default_rng(8)
    ps = [member(rng, n, 40, r, "nf4") for n, r in zip((24, 16), ranks, strict=True)]
    x, weight, dy, d_residual = normal(rng, 2, 3, 40), normal(rng, 40), normal(rng, 2, 3, 40), normal(rng, 2, 3, 40)
    scalings = [0.7, 1.0]

    def with_pairs(pairs):
        return [Projection(p.weight, *pair) for p, pair in zip(ps, pairs, strict=True)]

    def ours(x, pairs):
        return norm_linear(x, weight, Norm(1e-5), with_pairs(pairs), scalings)

    def apart(x, pairs):
        normed = rms_norm(x, weight, eps=1e-5, implementation="xla")
        return lora_linear(normed, with_pairs(pairs), scalings), x

    pairs = [(p.a, p.b) for p in ps]
    (out, pull), (expected, pull_expected) = (jax.vjp(f, x, pairs) for f in (ours, apart))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(close, out, expected)
    jax.tree.map(close, pull((dy, d_residual)), pull_expected((dy, d_residual)))


def test_an_index_into_a_stack_reads_that_matrix():
    rng = np.random.default_rng(5)
    layers = [quantize(normal(rng, 24, 40)) for _ in range(3)]
    stack, x = nf4.stack(layers), normal(rng, 2, 40)
    for i, layer in enumerate(layers):
        ours = jax.jit(lambda i: lora_linear(x, [Projection(stack.at(i))], [1.0]))(jnp.int32(i))
        np.testing.assert_allclose(ours, lora_linear(x, [Projection(layer)], [1.0]), rtol=1e-6, atol=1e-6)


def test_only_codes_and_scales_are_kept_for_the_backward_pass():
    rng = np.random.default_rng(6)
    x, q = normal(rng, 3, 40), quantize(normal(rng, 24, 40))
    _, pull_back = jax.vjp(lambda x: lora_linear(x, [Projection(q)], [1.0]), x)
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "dtype")]
    assert any(leaf.dtype == jnp.uint8 and leaf.size == q.codes.size for leaf in kept)
    assert sum(leaf.nbytes for leaf in kept) <= q.nbytes + x.nbytes


def test_room_is_whole_blocks():
    pair = lambda r: Projection(None, np.zeros((r, 8)), np.zeros((4, r)))  # noqa: E731
    assert [room_of(ps) for ps in ([Projection(None)], [pair(1)], [pair(64)], [pair(32)] * 3)] == [0, 64, 64, 128]


def test_widths_that_do_not_fit_are_named():
    rng = np.random.default_rng(7)
    with pytest.raises(ValueError, match=r"\(24, 40\)"):
        lora_linear(normal(rng, 3, 39), [Projection(quantize(normal(rng, 24, 40)))], [1.0])
