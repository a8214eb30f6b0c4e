"""8-bit blockwise quantisation of flat arrays with the dynamic map: the absmax of NF4 blocks, and optimizer moments.

A flat float32 array is cut into blocks of 256; a block keeps its largest magnitude and, per value, the code of a map
entry near value / absmax, by bitsandbytes's CPU rule (`pallas_kernels/adamw_8bit/codes.py`).
Source: 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861); bitsandbytes 0.50.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from fastft_jax.pallas_kernels.adamw_8bit import BLOCK, decode, encode


def quantize(x: Float[Array, "n"], *, signed: bool = True) -> tuple[UInt8[Array, "n"], Float[Array, "S"]]:
    """Codes uint8 [n] and absmax float32 [ceil(n / 256)] of a flat float32 array; a block of zeros has codes 0.

    `signed=False` is for values >= 0. Magnitudes below 2**-126 count as zero.
    """
    (n,) = x.shape
    codes, absmax = encode(jnp.pad(x.astype(jnp.float32), (0, -n % BLOCK)).reshape(-1, BLOCK), signed)
    return codes.reshape(-1)[:n], absmax


def dequantize(codes: UInt8[Array, "n"], absmax: Float[Array, "S"], *, signed: bool = True) -> Float[Array, "n"]:
    """map[code] * absmax[i // 256], float32."""
    (n,) = codes.shape
    return decode(jnp.pad(codes, (0, -n % BLOCK)).reshape(-1, BLOCK), absmax, signed).reshape(-1)[:n]
