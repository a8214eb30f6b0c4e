"""Random weights as functions of (seed, index): one fused pass that writes the result and holds nothing else.

A generator with a state, or normals that are then quantised, would compile several kernels for every shape and hold
the weights in float32 on the way. Here a hash of the index picks from tables of quantiles.
"""

import math
from functools import cache, partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8, UInt32

from fastft_jax.pallas_kernels.nf4 import NF4_CODE, dynamic_map
from fastft_jax.quant.nf4 import BLOCK

SCALE = 0.02  # of the normal distribution: as wide as trained weights are
QUANTILES = 4096
GROUPS_PER_SCALE = 256


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's last step: a permutation of the 32-bit numbers in which every bit of x moves every other."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def random_bits(seeds: UInt32[Array, "L"], count: int) -> UInt32[Array, "L n"]:
    """`count` numbers of 32 random bits for each seed."""
    return _mix(_mix(lax.iota(jnp.uint32, count))[None] ^ _mix(seeds)[:, None])


@partial(jax.jit, static_argnums=(1, 2))
def normal(seeds: UInt32[Array, "L"], shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Float[Array, "..."]:
    """normal(0, SCALE) of that shape, a seed for each part of its first axis."""
    bits = random_bits(seeds, math.prod(shape) // seeds.shape[0]).reshape(shape)
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * np.float32(2**-22) - 1  # within (-1, 1)
    return (lax.erf_inv(uniform) * np.float32(2**0.5 * SCALE)).astype(dtype)


@partial(jax.jit, static_argnums=1)
def nf4_blocks(
    seeds: UInt32[Array, "L"], groups: int
) -> tuple[UInt8[Array, "L G 32"], UInt8[Array, "L G"], Float[Array, "L S"], Float[Array, "L"]]:
    """Codes, absmax, absmax_scale and absmax_offset as double-quantised normal(0, SCALE) weights have them.

    Codes and absmax are drawn one by one from their distributions in quantised normals; what binds them together in
    a block (its largest element has code 0 or 15) is left out. Decoded weights have a standard deviation of SCALE.
    """
    codes, absmax, scale, offset = quantiles()
    bits = random_bits(seeds, groups * BLOCK // 2).reshape(-1, groups, BLOCK // 2)
    high, low = (jnp.asarray(codes)[b & (QUANTILES - 1)] for b in (bits >> 20, bits >> 4))
    picked = jnp.asarray(absmax)[random_bits(_mix(seeds), groups) >> 20]
    count, scales = seeds.shape[0], -(-groups // GROUPS_PER_SCALE)
    return high << 4 | low, picked, jnp.full((count, scales), scale), jnp.full(count, offset)


@cache
def quantiles() -> tuple[np.ndarray, np.ndarray, np.float32, np.float32]:
    """Quantiles of the NF4 codes and of the uint8 absmax of quantised normals; scale and offset of the latter.

    The largest magnitude a in a block has P(a <= t) = P(|x| <= t)^64. Given a, one element is -a or a, and the others
    are normals cut off there.
    """
    normal, shares = NormalDist(), (np.arange(QUANTILES) + 0.5) / QUANTILES
    magnitude = lambda share, of: normal.inv_cdf((1 + share ** (1 / of)) / 2)  # noqa: E731 - quantile of the largest
    largest = np.array([magnitude(share, BLOCK) for share in shares])
    midpoints = (NF4_CODE[:-1] + NF4_CODE[1:]) / 2
    cut_off = [
        [(normal.cdf(m * a) - normal.cdf(-a)) / (1 - 2 * normal.cdf(-a)) for m in midpoints] for a in largest[8::16]
    ]
    up_to = 0.5 / BLOCK + (1 - 1 / BLOCK) * np.mean(cut_off, axis=0)  # P(code <= 0 .. 14)
    codes = np.searchsorted(up_to, shares).astype(np.uint8)
    offset = largest.mean()
    scale = magnitude(0.5, BLOCK * GROUPS_PER_SCALE) - offset  # as of the largest of 256 blocks
    distances = np.abs(dynamic_map()[None] - ((largest - offset) / scale)[:, None])
    absmax = np.argmin(distances, axis=1).astype(np.uint8)
    # Drawn apart, wide blocks have as large codes as narrow ones, which would widen the whole by 3%.
    spread = np.std(NF4_CODE[codes]) * np.sqrt(np.mean((dynamic_map()[absmax] * scale + offset) ** 2))
    return codes, absmax, np.float32(SCALE * scale / spread), np.float32(SCALE * offset / spread)
