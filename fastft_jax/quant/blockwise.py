"""8-bit blockwise quantisation with the dynamic map: the absmax of NF4 blocks, and the moments of 8-bit optimizers.

A flat float32 array is cut into blocks of 256; a block keeps its largest magnitude and, per value, the code of a map
entry near value / absmax. Source: 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861); bitsandbytes 0.50.

"Near" is bitsandbytes's CPU rule, bit for bit: value / absmax is first rounded to a grid of 2**16 points on [-1, 1],
then takes the entry nearest to the grid point. Entries closer to zero than 1.5e-5 are therefore out of reach and zero
itself becomes about +1.5e-5 of its block's absmax, which also keeps a small second moment from vanishing under its
root. (bitsandbytes's CUDA kernels search the map itself; what they encode may be an entry apart, what they decode is
the same.)
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from fastft_jax.pallas_kernels.nf4 import dynamic_map
from fastft_jax.quant.exact import divide

BLOCK = 256


@functools.cache
def _thresholds(signed: bool) -> np.ndarray:
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


def _count_below(value: Float[Array, "..."], thresholds: np.ndarray) -> Array:
    """How many of 255 ascending thresholds lie strictly below each value: a binary search, unrolled into one fusion."""
    table = jnp.asarray(thresholds)
    count = jnp.zeros(value.shape, jnp.int32)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        pivot = table.at[count + (step - 1)].get(mode="promise_in_bounds")
        count = count + jnp.where(value > pivot, step, 0)
    return count


def quantize(x: Float[Array, "n"], *, signed: bool = True) -> tuple[UInt8[Array, "n"], Float[Array, "S"]]:
    """Codes uint8 [n] and absmax float32 [ceil(n / 256)] of a flat float32 array; a block of zeros has codes 0.

    `signed=False` is for values >= 0. Magnitudes below 2**-126 count as zero.
    """
    (n,) = x.shape
    blocks = jnp.pad(x.astype(jnp.float32), (0, -n % BLOCK)).reshape(-1, BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    scaled = blocks * divide(jnp.ones_like(absmax), absmax)[:, None]
    codes = jnp.where(absmax[:, None] > 0, _count_below(scaled, _thresholds(signed)), 0)
    return codes.astype(jnp.uint8).reshape(-1)[:n], absmax


def dequantize(codes: UInt8[Array, "n"], absmax: Float[Array, "S"], *, signed: bool = True) -> Float[Array, "n"]:
    """map[code] * absmax[i // 256], float32."""
    (n,) = codes.shape
    table = jnp.asarray(dynamic_map(signed))
    values = table.at[jnp.pad(codes, (0, -n % BLOCK)).astype(jnp.int32)].get(mode="promise_in_bounds")
    return (values.reshape(-1, BLOCK) * absmax[:, None]).reshape(-1)[:n]
