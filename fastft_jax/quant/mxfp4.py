"""MXFP4 matrices, as GPT-OSS is published: 4-bit floats in blocks of 32 with one power of two each; read only.

An element is sign, two bits of exponent and one of mantissa (e2m1): 0, 0.5, 1, 1.5, 2, 3, 4 or 6. A block is 16 bytes,
element 2i in the low nibble of byte i, and a scale byte s: element * 2^(s - 127).
Source: OCP Microscaling Formats (MX) Specification 1.0, 2023.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, UInt8

BLOCK = 32
MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
LARGEST_SCALE = 252  # 6 * 2^(252 - 127) is the last that float32 and bfloat16 hold


@jax.jit
def decode(blocks: UInt8[Array, "N G 16"], scales: UInt8[Array, "N G"]) -> BFloat16[Array, "N 32*G"]:
    """The matrix, exactly: one mantissa bit fits every dtype. Magnitudes below 2^-126 are 0, as NF4 takes them.

    Scales are at most `LARGEST_SCALE`. Made of integers, so that no device rounds or flushes anything.
    """
    codes = jnp.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK).astype(jnp.int32)
    bits = jnp.asarray(MAGNITUDES.view(np.int32))[codes & 7]
    shift = scales[..., None].astype(jnp.int32) - 127
    tiny = (codes & 7 == 0) | ((bits >> 23) + shift < 1)
    bits = jnp.where(tiny, 0, bits + (shift << 23)) | (codes >> 3 << 31)
    values = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return values.astype(jnp.bfloat16).reshape(scales.shape[0], -1)
