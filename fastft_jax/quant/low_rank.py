"""The best pair of low rank for a matrix, and LoftQ: an NF4 weight and a pair that together come closest to it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastft_jax.quant.nf4 import NF4Array, dequantize, quantize

_EXACT = jax.lax.Precision.HIGHEST
OVERSAMPLING = 8  # columns beyond r that the randomised search carries along


@partial(jax.jit, static_argnums=(1, 2))
def low_rank_pair(
    w: Float[Array, "N K"], r: int, power_iterations: int | None = None
) -> tuple[Float[Array, "R K"], Float[Array, "N R"]]:
    """A, B of rank r with B A the closest to w: with w = U S V^T, B = U_r sqrt(S_r) and A = sqrt(S_r) V_r^T; float32.

    power_iterations None decomposes w exactly; a number searches the range of w with as many powers of w w^T (Halko,
    Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4), which costs a fraction and loses little from 4 on.
    """
    w = w.astype(jnp.float32)
    if power_iterations is None:
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    else:
        width = min(r + OVERSAMPLING, *w.shape)
        q = _orthonormal(jnp.matmul(w, jax.random.normal(jax.random.key(0), (w.shape[1], width)), precision=_EXACT))
        for _ in range(power_iterations):
            q = _orthonormal(jnp.matmul(w.T, q, precision=_EXACT))
            q = _orthonormal(jnp.matmul(w, q, precision=_EXACT))
        u, s, vt = jnp.linalg.svd(jnp.matmul(q.T, w, precision=_EXACT), full_matrices=False)
        u = jnp.matmul(q, u, precision=_EXACT)
    root = jnp.sqrt(s[:r])
    return root[:, None] * vt[:r], u[:, :r] * root


def _orthonormal(columns: Float[Array, "N R"]) -> Float[Array, "N R"]:
    return jnp.linalg.qr(columns)[0]


class LoftQ(NamedTuple):
    """Q + B A close to a matrix. Q = NF4(w - last_b last_a): the pair of the turn before, None after a single turn."""

    q: NF4Array
    a: Float[Array, "R K"]
    b: Float[Array, "N R"]
    last_a: Float[Array, "R K"] | None
    last_b: Float[Array, "N R"] | None


def loftq(
    w: Float[Array, "N K"], r: int, iterations: int, power_iterations: int | None = None, double_quant: bool = True
) -> LoftQ:
    """Q in NF4 and a pair of rank r with Q + B A close to w, by turns: Q = NF4(w - B A), then B A = w - Q at rank r.

    After one turn Q is the plain NF4(w). Source: Li et al. 2023, arXiv:2310.08659, algorithm 1.
    """
    last_a, last_b, q = None, None, _encode(w, double_quant=double_quant)
    for turn in range(iterations):
        if turn:
            (last_a, last_b), q = (a, b), requantised(w, a, b, double_quant)
        a, b = low_rank_pair(_difference(w, q), r, power_iterations)
    return LoftQ(q, a, b, last_a, last_b)


@partial(jax.jit, static_argnums=3)
def requantised(w: Float[Array, "N K"], a: Float[Array, "R K"], b: Float[Array, "N R"], double_quant: bool) -> NF4Array:
    """NF4(w - B A), from w's own dtype."""
    rest = w.astype(jnp.float32) - jnp.matmul(b, a, precision=_EXACT)
    return quantize(rest.astype(w.dtype), double_quant=double_quant)


_encode = jax.jit(quantize, static_argnames="double_quant")


@jax.jit
def _difference(w: Float[Array, "N K"], q: NF4Array) -> Float[Array, "N K"]:
    return w.astype(jnp.float32) - dequantize(q, jnp.float32)
