"""Activations and their derivatives, from what a Triton kernel can compute: it has no error function."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMALL = 1.25
SMALL_COEFFICIENTS = (0.39894226, -0.06648999, 0.0099715, -0.0011827092, 0.00011032722, -6.644799e-06)
"""`(Phi(x) - 1/2) / x` in powers of x^2, for |x| < 1.25: within 2e-9 of Phi before rounding."""
TAIL_COEFFICIENTS = (
    0.13962978,
    0.13963333,
    0.122396536,
    0.0900918,
    0.031342104,
    0.043027215,
    -0.10889085,
    0.042898748,
)
"""`Phi(-x) exp(x^2 / 2)` in powers 1, 2, .. of t = 1 / (1 + 0.35 x), for x >= 1.25: within 1.1e-7 of its value.

Both sets are minimax fits (iteratively reweighted least squares, in float64) to scipy's ndtr and erfcx.
"""


CLAMP_LIMIT, CLAMP_ALPHA = 7.0, 1.702
"""Of "clamped_silu", GPT-OSS's (swiglu_limit and swiglu_alpha): where gate and up are cut, and the sigmoid's gain."""


def value_and_slope(name: str, x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """act(x) and act'(x) of float32 x: "silu", "gelu_tanh", "gelu", or "clamped_silu" as GPT-OSS has it:
    x sigmoid(1.702 x) of min(x, 7), whose slope is 0 from 7 on (at 7 itself, too, as in torch)."""
    if name == "clamped_silu":
        kept = jnp.minimum(x, CLAMP_LIMIT)
        s = jax.nn.sigmoid(CLAMP_ALPHA * kept)
        slope = s * (1.0 + CLAMP_ALPHA * kept * (1.0 - s))
        return kept * s, jnp.where(x >= CLAMP_LIMIT, 0.0, slope)
    if name == "silu":
        s = jax.nn.sigmoid(x)
        return x * s, s * (1.0 + x * (1.0 - s))
    if name == "gelu_tanh":
        a, c = 0.7978845608028654, 0.044715  # sqrt(2 / pi), and the cubic term of arXiv:1606.08415
        s = jax.nn.sigmoid(2.0 * a * (x + c * x * x * x))  # equals (1 + tanh) / 2, without its cancellation
        return x * s, s * (1.0 + x * (1.0 - s) * 2.0 * a * (1.0 + 3.0 * c * x * x))
    cdf, pdf = normal(x)
    return x * cdf, cdf + x * pdf


def linear_half(name: str, up: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."] | float]:
    """What the activation is multiplied with, and its derivative: up itself, or clip(up, -7, 7) + 1."""
    if name != "clamped_silu":
        return up, 1.0
    inside = (jnp.abs(up) < CLAMP_LIMIT).astype(up.dtype)
    return jnp.clip(up, -CLAMP_LIMIT, CLAMP_LIMIT) + 1.0, inside


def normal(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Distribution function and density of the standard normal law; `2 Phi(sqrt(2) x) - 1` is erf within 2e-7.

    The tail is a multiple of the density, so it keeps its relative precision where 1 - erf would lose it.
    """
    size, square = jnp.abs(x), x * x
    bell = jnp.exp(-0.5 * square)
    t = 1.0 / (1.0 + 0.35 * size)
    tail = bell * t * _polynomial(TAIL_COEFFICIENTS, t)
    beyond = jnp.where(x < 0, tail, 1.0 - tail)
    near = 0.5 + x * _polynomial(SMALL_COEFFICIENTS, square)
    return jnp.where(size < SMALL, near, beyond), 0.3989422804014327 * bell


def _polynomial(coefficients: tuple[float, ...], x: Float[Array, "..."]) -> Float[Array, "..."]:
    total = jnp.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total
