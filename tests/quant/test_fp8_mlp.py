"""A gated feed-forward layer in fp8 as one op: the same as its halves one after the other, kept or computed again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastft_jax.models.residuals import Keep, Slot
from fastft_jax.pallas_kernels import pallas
from fastft_jax.quant import fp8, nf4
from fastft_jax.quant.fp8_mlp import fp8_mlp
from fastft_jax.quant.glu_linear import glu_linear
from fastft_jax.quant.lora_linear import Projection
from fastft_jax.quant.norm_linear import Norm, norm_linear

pytestmark = pytest.mark.usefixtures("quick_compilation")
D, F, M = 64, 192, 70  # 70 rows: with up to 64 a GPU reads NF4 directly
SCALINGS = (1.0, 0.5, 0.7)
ALL = (4, 4, 4)
quantize = jax.jit(nf4.quantize)


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def layer(ranks=ALL, seed: int = 0):
    """Projections of gate, up and down, the norm's weight, x, and the cotangents of both outputs."""
    rng = np.random.default_rng(seed)
    members = []
    for (n, k), r in zip(((F, D), (F, D), (D, F)), ranks, strict=True):
        w = dataclasses.replace(quantize(normal(rng, n, k) / k**0.5), compute="fp8")
        members.append(Projection(w, normal(rng, r, k) / k**0.5, 0.3 * normal(rng, n, r)) if r else Projection(w))
    return members, 1 + 0.1 * normal(rng, D), *(normal(rng, 2, M // 2, D) for _ in range(3))


def as_one(x, weight, projections, keep):
    return fp8_mlp(x, weight, Norm(1e-5), projections, SCALINGS, keep)


def in_halves(x, weight, projections, keep):
    gate_up, x = norm_linear(x, weight, Norm(1e-5), projections[:2], SCALINGS[:2], keep)
    return glu_linear(gate_up, projections[2], SCALINGS[2], keep=keep), x


def in_float(x, weight, projections, keep):
    """The formula in the dtype of x: no fp8, no custom gradients."""

    def linear(x, p, s):
        y = x @ nf4.dequantize(p.weight, jnp.float32).astype(x.dtype).T
        return y if p.a is None else y + s * (x @ p.a.T.astype(x.dtype)) @ p.b.T.astype(x.dtype)

    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight.astype(x.dtype)
    gate, up, down = ((p, s) for p, s in zip(projections, SCALINGS, strict=True))
    return linear(jax.nn.silu(linear(normed, *gate)) * linear(normed, *up), *down), x


def outcome(run, given, dtype=jnp.float32, keep=None) -> list[np.ndarray]:
    """y, x, dx, and dA and dB of each adapter, of a layer whose cotangents are given."""
    projections, weight, x, dy, d_residual = given

    def f(x, pairs):
        here = [Projection(p.weight, *ab) for p, ab in zip(projections, pairs, strict=True)]
        return run(x, weight, here, keep or Keep())

    def both(x, pairs, cotangents):
        y, pull = jax.vjp(f, x, pairs)
        return y, pull(cotangents)

    cotangents = (dy.astype(dtype), d_residual.astype(dtype))
    results = both(x.astype(dtype), [(p.a, p.b) for p in projections], cotangents)
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(results)]


def off(got, expected) -> list[float]:
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(got, expected, strict=True)]


@pytest.mark.parametrize("ranks", [ALL, (None, 4, None), (4, None, 70), (None, None, None)])
def test_values_and_gradients_are_those_of_the_two_halves(ranks):
    given = layer(ranks)
    one, halves = outcome(as_one, given), outcome(in_halves, given)
    # what they quantise differs in the last bits of float32, so that a few e4m3 values may be neighbours: 2**-4 of one
    # value in a thousand
    assert max(off(one, halves)) < 4e-3
    one, halves = (outcome(run, given, jnp.bfloat16) for run in (as_one, in_halves))
    assert max(off(one, halves)) < 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_close_to_the_formula_in_float32_with_the_noise_of_fp8(dtype):
    given = layer(seed=1)
    errors = off(outcome(as_one, given, dtype), outcome(in_float, given))
    assert errors[1] < 3e-3  # x itself
    # two factors with errors of 2.6% a product, up to four products in a row
    assert 1e-3 < errors[0] < 0.08 and max(errors) < 0.12


class Recorder(Keep):
    """Keeps what the given names stand for, by key, and notes it; everything in a stack of two of which it is one."""

    def __init__(self, names, stored=None):
        super().__init__(dict.fromkeys(names, "save"))
        self.stored, self._given = {}, stored

    def _kept(self, key, how, value):
        self.stored[key] = value
        return value if self._given is None else self._given[key]

    def _slot(self, key, value):
        self.stored[key] = value
        kept = value if self._given is None else self._given[key]
        return Slot(value, jnp.stack([jnp.full_like(kept, jnp.nan), kept]), jnp.int32(1))


@pytest.mark.parametrize("names", [("gate_up", "lora_h"), ("gate_up",), ("lora_h",)])
def test_what_is_kept_is_all_that_the_gradients_need(names):
    """The forward pass's kept values, given to a backward pass: as residuals.py does it."""
    given = layer(seed=2)
    projections, weight, x, *cotangents = given
    plain = outcome(as_one, given)
    recorder = Recorder(names)
    as_one(x, weight, projections, recorder)
    keys = {"gate_up": ["gate_up/0", "gate_up/1"], "lora_h": ["lora_h/0", "lora_h/1"]}
    assert sorted(recorder.stored) == sorted(key for name in names for key in keys[name])
    assert recorder.stored.get("gate_up/1", jnp.ones(M)).shape == (M,)
    assert max(off(outcome(as_one, given, keep=Recorder(names, recorder.stored)), plain)) < 4e-3


def test_with_the_sums_kept_the_backward_pass_does_not_compute_them_again():
    projections, weight, x, dy, d_residual = layer(seed=3)
    recorder = Recorder(("gate_up", "lora_h"))
    as_one(x, weight, projections, recorder)

    def products(names) -> int:
        def backward(x, stored, cotangents):
            keep = Recorder(names, stored)
            return jax.vjp(lambda x: as_one(x, weight, projections, keep), x)[1](cotangents)

        text = jax.jit(backward).lower(x, recorder.stored, (dy, d_residual)).compile().as_text()
        return text.count(f"f32[{M},{2 * F}]{{1,0}} dot(") + text.count("__onednn$matmul")

    assert products(("gate_up", "lora_h")) < products(())


def test_the_kernels_give_what_the_reference_gives(monkeypatch):
    """As on a GPU, but interpreted: the stack read in place, the adapters' columns, the norm's e4m3 rows."""
    given, names = layer((4, 8, 4), seed=4), ("gate_up", "lora_h")
    plain = outcome(as_one, given, jnp.bfloat16, Recorder(names))
    call, seen = pallas.call, set()

    def interpreted(*a, **options):
        seen.add(options["name"])
        return call(*a, **options | {"interpret": True})

    def matmul(x8, w8, dtype):
        return (x8.astype(jnp.float32) @ w8.astype(jnp.float32).T).astype(dtype)

    monkeypatch.setattr(pallas, "call", interpreted)
    monkeypatch.setattr(fp8.fp8, "matmul", matmul)  # a CPU has no fp8 product
    monkeypatch.setattr(pallas, "on_gpu", lambda: True)
    kernels = outcome(as_one, given, jnp.bfloat16, Recorder(names))
    assert {"fp8_rms_norm", "fp8_silu_glu", "fp8_silu_glu_backward", "fp8_quantise_rows_e4m3"} <= seen
    assert max(off(kernels, plain)) < 1e-2
