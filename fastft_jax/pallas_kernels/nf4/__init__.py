"""NF4 decoding: w[g, j] = code[nibble(g, j)] * absmax[g], float32, then one cast.

Blocks of 64 weights with one absmax; byte j of a block holds element j in its high nibble and element j + 32 in its
low one, so that a kernel reads and writes whole halves. The values are bitsandbytes's, the byte order is not.
Source: QLoRA (arXiv 2305.14314); bitsandbytes 0.50, dequantize_4bit and the nested state of its QuantState.
"""

from typing import Literal

import jax
from jaxtyping import Array, Float, UInt8

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.nf4 import reference
from fastft_jax.pallas_kernels.nf4.codebooks import NF4_CODE, dynamic_map

Implementation = Literal["xla", "triton"]

__all__ = ["NF4_CODE", "Implementation", "dequantize", "dynamic_map"]


def dequantize(
    codes: UInt8[Array, "G 32"],
    absmax: Float[Array, "G"] | UInt8[Array, "G"],
    absmax_scale: Float[Array, "S"] | None = None,
    absmax_offset: Float[Array, ""] | None = None,
    *,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | None = None,
) -> Float[Array, "G 64"]:
    """Decode G blocks of 64 NF4 weights to `dtype` [G, 64].

    absmax is float32, or uint8 with absmax_scale float32 [ceil(G / 256)] and absmax_offset float32 []:
    absmax[g] = map[absmax[g]] * absmax_scale[g // 256] + absmax_offset, both operations rounded. Both implementations
    and bitsandbytes on a CPU agree bit for bit (float32 values below 2**-126 aside, which XLA on a CPU flushes to
    zero). `None` picks "triton" on a GPU, "xla" elsewhere or above the kernel's 2 GiB of codes. Not differentiable in
    the kernel: quantised weights are frozen. Raises ValueError for shapes, dtypes or names that do not fit.
    """
    groups = codes.shape[0]
    if codes.ndim != 2 or codes.shape[1] != 32 or codes.dtype != "uint8" or absmax.shape != (groups,):
        raise ValueError(
            f"NF4 codes must be uint8 [G, 32] and absmax [G], got {codes.dtype}{codes.shape} and {absmax.shape}"
        )
    double = absmax.dtype == "uint8"
    if double != (absmax_scale is not None) or double != (absmax_offset is not None):
        raise ValueError(f"a uint8 absmax comes with a scale and an offset, a float32 one without; got {absmax.dtype}")
    if double and absmax_scale.shape != (-(-groups // reference.GROUPS_PER_SCALE),):
        raise ValueError(f"{groups} blocks need {-(-groups // 256)} absmax scales, got {absmax_scale.shape}")
    if implementation is None:
        from_kernel = pallas.on_gpu() and codes.size < 2**31
        implementation = "triton" if from_kernel else "xla"
    if implementation == "xla":
        return reference.dequantize(codes, absmax, absmax_scale, absmax_offset, dtype)
    if implementation == "triton":
        from fastft_jax.pallas_kernels.nf4 import triton

        return triton.dequantize(codes, absmax, absmax_scale, absmax_offset, dtype)
    raise ValueError(f"unknown NF4 implementation {implementation!r}: use None, 'xla' or 'triton'")
