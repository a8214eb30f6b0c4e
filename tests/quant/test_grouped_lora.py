"""Experts' linears and the gated activation before them: values and every gradient, against torch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fastft_jax.pallas_kernels import nf4 as kernel
from fastft_jax.quant import nf4
from fastft_jax.quant.grouped_glu import grouped_glu_linear
from fastft_jax.quant.grouped_lora import grouped_lora_linear
from fastft_jax.quant.lora_linear import Projection

pytestmark = pytest.mark.usefixtures("quick_compilation")
E, K, F, D = 3, 64, 64, 40
SIZES = (7, 0, 4)  # of uneven groups one is empty
SCALINGS = (0.5, 2.0, 3.0)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def experts(seed: int, n: int, k: int, quantised: bool):
    """One layer's weights [E, N, K] as our op has them, of a stack of two layers if they are NF4, and as numbers."""
    if not quantised:
        w = normal(seed, E, n, k) / k**0.5
        return w, w
    rng, lead, groups = np.random.default_rng(seed), (2, E), n * k // 64
    codes, absmax = (rng.integers(0, 256, (*lead, *size), dtype=np.uint8) for size in ((groups, 32), (groups,)))
    scale, offset = rng.uniform(0.1, 0.2, (*lead, 1)), rng.uniform(0.2, 0.3, lead)
    stacked = nf4.NF4Array(*map(jnp.asarray, (codes, absmax, jnp.float32(scale), jnp.float32(offset))), (n, k))
    one_layer = jax.tree.map(lambda leaf: leaf[1], stacked)
    return stacked.at(jnp.int32(1)), nf4.dequantize_stack(one_layer, jnp.float32)


def linear64(x, w, a, b, s):
    out = []
    for rows, *each in zip(x.split(SIZES), *(t if t is not None else [None] * E for t in (w, a, b)), strict=True):
        w_e, a_e, b_e = each
        out.append(rows @ w_e.T + (0 if a_e is None else s * (rows @ a_e.T) @ b_e.T))
    return torch.cat(out)


@pytest.mark.parametrize(
    ("quantised", "ranks", "biased"),
    [(False, (3, None, 5, 2), False), (True, (3, None, 5, 2), True), (False, (None,) * 4, True)],
    ids=["adapted", "adapted_nf4_biased", "biased"],
)
def test_values_and_gradients_equal_float64(quantised, ranks, biased, monkeypatch):
    """gate, up (without an adapter), a third, side by side, and down behind the weighted activation of the first two.
    Biases are frozen, and down's is weighted as the activation is.

    Quantised, as on a GPU: the kernel decodes several linears among each other's rows, straight from the stack. float32
    sums of at most 168 products of normal numbers, in float32: 1e-5 of the largest value.
    """
    monkeypatch.setattr(kernel, "kernel_takes", lambda codes: quantised)
    made = [experts(i, n, k, quantised) for i, (n, k) in enumerate([(F, K), (F, K), (D, K), (D, F)])]
    biases = [normal(40, E, 2 * F + D), normal(41, E, D)] if biased else [None, None]
    pairs = [
        (None, None) if r is None else (normal(10 + i, E, r, k), normal(20 + i, E, n, r))
        for i, (r, (n, k)) in enumerate(zip(ranks, [(F, K), (F, K), (D, K), (D, F)], strict=True))
    ]
    x, weight, dy = normal(30, sum(SIZES), K), jnp.abs(normal(31, sum(SIZES))), normal(32, sum(SIZES), 2 * D)
    weights = [ours for ours, _ in made]

    @jax.jit
    def run(x, weight, pairs, weights, biases, dy):
        def both(x, weight, pairs):
            sizes = jnp.array(SIZES)
            first = [Projection(w, *pair) for w, pair in zip(weights[:3], pairs[:3], strict=True)]
            y = grouped_lora_linear(x, sizes, first, SCALINGS, bias=biases[0])
            last = Projection(weights[3], *pairs[3])
            out = grouped_glu_linear(y[:, : 2 * F], weight, sizes, last, 1.5, bias=biases[1])
            return jnp.concatenate([y[:, 2 * F :], out], axis=1)

        y, vjp = jax.vjp(both, x, weight, pairs)
        return y, vjp(dy)

    y, (dx, d_weight, d_pairs) = run(x, weight, pairs, weights, biases, dy)

    leaf = lambda a: torch.tensor(np.asarray(a), dtype=torch.float64, requires_grad=True)  # noqa: E731
    x64, weight64 = leaf(x), leaf(weight)
    pairs64 = [tuple(None if p is None else leaf(p) for p in pair) for pair in pairs]
    plain = [torch.tensor(np.asarray(w), dtype=torch.float64) for _, w in made]
    first, last = (
        0 if b is None else torch.tensor(np.asarray(b).repeat(SIZES, axis=0), dtype=torch.float64) for b in biases
    )
    three = torch.cat(
        [linear64(x64, w, *p, s) for w, p, s in zip(plain[:3], pairs64[:3], SCALINGS, strict=True)], dim=1
    )
    gate, up, third = (three + first).split((F, F, D), dim=1)
    act = torch.nn.functional.silu(gate) * up
    expected = torch.cat([third, (linear64(act, plain[3], *pairs64[3], 1.5) + last) * weight64[:, None]], dim=1)
    expected.backward(torch.tensor(np.asarray(dy), dtype=torch.float64))

    wanted = [expected.detach(), x64.grad, weight64.grad, *(p.grad for pair in pairs64 for p in pair if p is not None)]
    ours = [y, dx, d_weight, *jax.tree.leaves(d_pairs)]
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
