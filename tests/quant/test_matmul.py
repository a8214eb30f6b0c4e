"""Products with frozen NF4 weights and LoRA pairs: values, gradients, and what the backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastft_jax.quant import matmul as ops
from fastft_jax.quant import nf4

N, K, R, SCALING = 24, 40, 4, 0.7
quantize = jax.jit(nf4.quantize)
dequantize = jax.jit(nf4.dequantize, static_argnums=1)


def arrays(seed: int = 0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((2, 3, K)), dtype)
    dy = jnp.asarray(rng.standard_normal((2, 3, N)), dtype)
    w = quantize(jnp.asarray(rng.standard_normal((N, K)), jnp.float32))
    return x, dy, w


@jax.jit
def product(x, dy, w):
    y, pull_back = jax.vjp(lambda x: ops.matmul(x, w), x)
    return y, pull_back(dy)


def float64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_product_and_input_gradient_equal_float64_numpy_with_the_decoded_weight(kind):
    x, dy, q = arrays()
    dense = dequantize(q, jnp.float32)
    w = q if kind == "nf4" else dense
    y, (dx,) = product(x, dy, w)
    # float32 sums of 40 and 24 products of order 1: 40 * 2**-24 = 2e-6, times the largest partial sum, about 10
    np.testing.assert_allclose(y, float64(x) @ float64(dense).T, rtol=0, atol=2e-5)
    np.testing.assert_allclose(dx, float64(dy) @ float64(dense), rtol=0, atol=2e-5)


def test_bfloat16_product_is_the_float32_one_rounded_once():
    x, dy, q = arrays(dtype=jnp.bfloat16)
    dense = float64(dequantize(q, jnp.bfloat16))
    y, (dx,) = product(x, dy, q)
    assert y.dtype == dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(float64(y), float64(x) @ dense.T, rtol=2**-8, atol=1e-4)  # half an ulp is 2**-9
    np.testing.assert_allclose(float64(dx), float64(dy) @ dense, rtol=2**-8, atol=1e-4)


def test_a_dense_weight_has_its_gradient():
    x, dy, q = arrays()
    dense = dequantize(q, jnp.float32)
    _, pull_back = jax.vjp(lambda w: ops.matmul(x, w), dense)
    expected = float64(dy).reshape(-1, N).T @ float64(x).reshape(-1, K)
    np.testing.assert_allclose(pull_back(dy)[0], expected, rtol=0, atol=2e-5)


def test_only_codes_and_scales_are_kept_for_the_backward_pass():
    x, _, q = arrays()
    _, pull_back = jax.vjp(lambda x: ops.matmul(x, q), x)
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "dtype")]
    assert any(leaf.dtype == jnp.uint8 and leaf.size == q.codes.size for leaf in kept)
    assert sum(leaf.nbytes for leaf in kept) <= q.nbytes
    assert not any(jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size >= q.absmax.size for leaf in kept)


@pytest.mark.parametrize("remat", [True, False])
def test_gradients_through_a_scan_over_stacked_frozen_layers_equal_a_loop_over_dense_ones(remat):
    rng = np.random.default_rng(0)
    layers = [quantize(jnp.asarray(rng.standard_normal((K, K)) * 0.2, jnp.float32)) for _ in range(3)]
    a = jnp.asarray(rng.standard_normal((3, R, K)) * 0.2, jnp.float32)
    b = jnp.asarray(rng.standard_normal((3, K, R)) * 0.2, jnp.float32)
    x, _, _ = arrays()

    def scanned(trained, x, frozen):
        def layer(h, leaves):
            q, a, b = leaves
            return jnp.tanh(ops.matmul(h, q) + ops.lora(h, a, b, SCALING)), None

        layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        return jnp.sum(jax.lax.scan(layer, x, (frozen, *trained))[0] ** 2)

    def looped(trained, x, dense):
        for i, w in enumerate(dense):
            x = jnp.tanh(x @ w.T + SCALING * (x @ trained[0][i].T) @ trained[1][i].T)
        return jnp.sum(x**2)

    ours = jax.jit(jax.value_and_grad(scanned, (0, 1)))((a, b), x, nf4.stack(layers))
    expected = jax.jit(jax.value_and_grad(looped, (0, 1)))((a, b), x, [dequantize(q, jnp.float32) for q in layers])
    # the same float32 sums in another order, through three layers
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-5), ours, expected)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-5), (jnp.bfloat16, 0.15)])
def test_lora_and_its_gradients_equal_float64_numpy(dtype, tolerance):
    x, dy, _ = arrays(1, dtype)
    rng = np.random.default_rng(2)
    a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((R, K), (N, R)))
    y, pull_back = jax.vjp(lambda x, a, b: ops.lora(x, a, b, SCALING), x, a, b)
    dx, da, db = pull_back(dy)
    assert y.dtype == dx.dtype == dtype and da.dtype == db.dtype == jnp.float32
    a64, b64 = (float64(t.astype(dtype)) for t in (a, b))
    x64, dy64 = float64(x).reshape(-1, K), float64(dy).reshape(-1, N)
    # bfloat16: values up to 40 pass through an R-wide intermediate that is rounded to 2**-9 of itself
    close = lambda ours, true: np.testing.assert_allclose(float64(ours).reshape(true.shape), true, 0.02, tolerance)  # noqa: E731
    close(y, SCALING * x64 @ a64.T @ b64.T)
    close(dx, SCALING * dy64 @ b64 @ a64)
    close(da, SCALING * (dy64 @ b64).T @ x64)
    close(db, SCALING * dy64.T @ (x64 @ a64.T))


def test_bfloat16_lora_gradients_are_accumulated_beyond_bfloat16():
    # 4096 equal contributions of 1 to every entry: a bfloat16 accumulator would stop at 256
    x, a, b = jnp.ones((4096, 8), jnp.bfloat16), jnp.full((1, 8), 0.125), jnp.ones((3, 1))
    _, pull_back = jax.vjp(lambda a, b: ops.lora(x, a, b, 1.0), a, b)
    da, db = pull_back(jnp.ones((4096, 3), jnp.bfloat16))
    assert np.all(np.asarray(db) == 4096) and np.all(np.asarray(da) == 3 * 4096)


def test_widths_that_do_not_fit_are_named():
    x, _, q = arrays()
    with pytest.raises(ValueError, match=r"\(24, 40\)"):
        ops.matmul(x[..., :39], q)
