"""float32 arithmetic with one defined result on every device, where encoders must agree with PyTorch bit for bit.

Compilers turn x / constant into x * (1 / constant), and XLA on a GPU divides to 2 ulp (29% of quotients on an H200 are
an ulp off); both would move codes that sit on an edge.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

LANES = 8
"""float32 lanes of the vectors PyTorch sums with (AVX2)."""
UNROLL = 4
LEVELS = 4


def _round_quotient(x: Array, a: Array, guess: Array) -> Array:
    """round(x / a) for positive integers (int32 modulo 2**32) from a guess that is a few units off; no ties exist."""
    remainder = x - guess * a  # small, so exact though both terms wrapped around
    return guess + (2 * remainder + a) // (2 * a)


def divide(x: Float[Array, "..."], a: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / a correctly rounded to float32, for a >= 0 and finite x; 0 where a, x or the quotient is zero or subnormal.

    Integer arithmetic on the significands corrects the quotient that the device computes.
    """
    xi, ai = (lax.bitcast_convert_type(jnp.asarray(t, jnp.float32), jnp.int32) for t in (x, a))
    significand = lambda i: (i & 0x7FFFFF) | 0x800000  # noqa: E731
    exponent = lambda i: (i >> 23) & 0xFF  # noqa: E731
    mx, ma = significand(xi), significand(ai)
    below_one = (mx < ma).astype(jnp.int32)
    quotient = mx.astype(jnp.float32) / ma.astype(jnp.float32)  # in (1/2, 2)
    guess = (quotient * jnp.where(below_one, 2.0**24, 2.0**23)).astype(jnp.int32)
    q = _round_quotient(mx << (23 + below_one), ma, guess)  # 24 bits; 2**24 carries into the exponent below
    e = exponent(xi) - exponent(ai) + 127 - below_one
    bits = (e << 23) + (q - 0x800000)
    bits = jnp.where((exponent(xi) == 0) | (exponent(ai) == 0) | (e < 1), 0, bits)
    bits = jnp.where(e > 254, 0x7F800000, bits)
    return lax.bitcast_convert_type(bits | (xi & jnp.int32(-(2**31))), jnp.float32)


def _in_order(x: Float[Array, "n ..."]) -> Float[Array, "..."]:
    """x[0] + x[1] + ... strictly from left to right: a reduction would let the compiler choose."""
    if x.shape[0] > 16:
        return lax.fori_loop(0, x.shape[0], lambda i, total: total + x[i], jnp.zeros(x.shape[1:], x.dtype))
    total = jnp.zeros(x.shape[1:], x.dtype)
    for row in x:
        total = total + row
    return total


def _rows_sum(x: Float[Array, "n c"]) -> Float[Array, "c"]:
    """Sum n rows through 4 accumulators; each takes 2**p sums of the one before, the last takes all."""
    power = max(4, max(x.shape[0] - 1, 0).bit_length() // LEVELS)
    step = 1 << power
    held = []  # what each accumulator holds at the end, lowest level first
    for _ in range(LEVELS - 1):
        full = x.shape[0] // step
        held.append(_in_order(x[full * step :]))
        # [full * step, c] -> [step, full, c]: all full groups are added up side by side, each in order
        x = _in_order(jnp.moveaxis(x[: full * step].reshape(full, step, x.shape[1]), 1, 0))
    return _in_order(jnp.stack([*held, _in_order(x)]))


def cascade_sum(x: Float[Array, "n"], lanes: int = LANES) -> Float[Array, ""]:
    """The sum of a float32 vector in the order of torch.sum on one thread with AVX2: the same bits on any device.

    torch.sum itself depends on the machine: with AVX-512 it has 16 lanes, and above 32,768 elements it splits the
    vector over its threads; such sums differ in the last bits. Source: PyTorch, ATen/native/cpu/SumKernel.cpp,
    cascade_sum.
    """
    whole = x.shape[0] // lanes * lanes
    vectors = x[:whole].reshape(-1, lanes)
    count = vectors.shape[0] // UNROLL
    partial = _rows_sum(vectors[: count * UNROLL].reshape(count, UNROLL * lanes)).reshape(UNROLL, lanes)
    total = _in_order(jnp.concatenate([partial[:1], vectors[count * UNROLL :], partial[1:]]))
    return _in_order(jnp.concatenate([x[whole:], total]))


def cascade_mean(x: Float[Array, "n"], lanes: int = LANES) -> Float[Array, ""]:
    """torch.mean of a float32 vector, on the terms of `cascade_sum`."""
    return divide(cascade_sum(x, lanes), jnp.float32(x.shape[0]))
