"""8-bit codes of blocks of 256 values: entries of the dynamic map, times the block's largest magnitude.

A code is the map's entry near value / absmax. "Near" is bitsandbytes's CPU rule, bit for bit: value / absmax is first
rounded to a grid of 2**16 points on [-1, 1], then takes the entry nearest to the grid point. Entries closer to zero
than 1.5e-5 are therefore out of reach and zero itself becomes about +1.5e-5 of its block's absmax, which also keeps a
small second moment from vanishing under its root. (bitsandbytes's CUDA kernels search the map itself; what they encode
may be an entry apart, what they decode is the same.)

Source: 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861); bitsandbytes 0.50.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from fastft_jax.pallas_kernels.nf4.codebooks import dynamic_map

BLOCK = 256


@functools.cache
def thresholds(signed: bool) -> np.ndarray:
    """float32 [255], ascending: a value's code is the number of thresholds strictly below it."""
    table = dynamic_map(signed).astype(np.float64)
    midpoints = (table[1:] + table[:-1]) / 2
    points = np.arange(65536, dtype=np.float32) / np.float32(65535) * np.float32(2) - np.float32(1)
    codes = np.searchsorted(midpoints, points.astype(np.float64))
    first = np.searchsorted(codes, np.arange(1, 256))  # the grid index at which each code is reached
    # Bisect over float32, as ordered integers, for the largest value whose grid index is still below `first`.
    low, high = np.full(255, -(2**30 + 2**29), np.int64), np.full(255, 2**30 + 2**29, np.int64)  # about -1e19 and 1e19
    for _ in range(33):
        middle = (low + high) // 2
        value = np.where(middle < 0, -1, 1) * np.abs(middle).astype(np.int32).view(np.float32)
        clipped = np.clip(value.astype(np.float32), -1, 1)
        index = ((clipped + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)).astype(np.int64)
        low, high = np.where(index < first, middle, low), np.where(index < first, high, middle)
    return (np.where(low < 0, -1, 1) * np.abs(low).astype(np.int32).view(np.float32)).astype(np.float32)


@functools.cache
def search_tree(signed: bool) -> np.ndarray:
    """float32 [256]: the thresholds as a balanced tree, the children of node i at 2 i and 2 i + 1; entry 0 is unused.

    Every level is contiguous: the neighbours of a vector read the same few cache lines, where a search through the
    sorted list would read 8 scattered ones.
    """
    tree = np.zeros(256, np.float32)
    for level in range(8):
        step = 256 >> level
        tree[1 << level : 2 << level] = thresholds(signed)[step // 2 - 1 :: step]
    return tree


def reciprocal(a: Float[Array, "G"]) -> Float[Array, "G"]:
    """1 / a correctly rounded to float32, for a >= 0; 0 where a or 1 / a is zero, subnormal or not finite.

    A GPU divides to 2 ulp, which would move codes that sit on an edge; integers correct what the device computes.
    """
    bits = lax.bitcast_convert_type(a, jnp.int32)
    exponent, fraction = bits >> 23, bits & 0x7FFFFF
    significand = fraction | 0x800000
    # 2**47 / significand in (2**23, 2**24], a few units off. No ties exist: a quotient of 24 bits is never halfway.
    guess = (140737488355328.0 / significand.astype(jnp.float32)).astype(jnp.int32)
    remainder = -(guess * significand)  # of 2**47, which is 0 modulo 2**32; small, so exact
    # floor(remainder / significand + 1/2); the 8 keeps the dividend positive, where rounding to zero is rounding down.
    quotient = guess + lax.div(2 * remainder + 17 * significand, 2 * significand) - 8
    result = ((253 - exponent) << 23) + (quotient - 0x800000)
    usable = (exponent > 0) & (result >= 0x800000)
    return lax.bitcast_convert_type(jnp.where(usable, result, 0), jnp.float32)


def nearest_codes(
    blocks: Float[Array, "G 256"], absmax: Float[Array, "G"], tree: Callable[[Int[Array, "G 256"]], Array]
) -> Int[Array, "G 256"]:
    """int32 codes of float32 blocks; `tree(i)` reads `search_tree`. A block of zeros has codes 0."""
    scaled = blocks * reciprocal(absmax)[:, None]
    node = jnp.ones(blocks.shape, jnp.int32)
    for _ in range(8):
        node = 2 * node + (scaled > tree(node)).astype(jnp.int32)
    return jnp.where(absmax[:, None] > 0, node - 256, 0)


def encode(blocks: Float[Array, "G 256"], signed: bool) -> tuple[UInt8[Array, "G 256"], Float[Array, "G"]]:
    """Codes and absmax of float32 blocks; values are >= 0 where `signed` is False. Below 2**-126 counts as zero."""
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    tree = jnp.asarray(search_tree(signed))
    codes = nearest_codes(blocks, absmax, lambda i: tree.at[i].get(mode="promise_in_bounds"))
    return codes.astype(jnp.uint8), absmax


def decode(codes: UInt8[Array, "G 256"], absmax: Float[Array, "G"], signed: bool) -> Float[Array, "G 256"]:
    """map[code] * absmax, float32."""
    table = jnp.asarray(dynamic_map(signed))
    return table.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds") * absmax[:, None]
