"""NF4 decoding: w[g, j] = code[nibble(g, j)] * absmax[g], float32, then one cast.

Blocks of 64 weights with one absmax; byte j of a block holds element j in its high nibble and element j + 32 in its
low one, so that a kernel reads and writes whole halves. The values are bitsandbytes's, the byte order is not.
Source: QLoRA (arXiv 2305.14314); bitsandbytes 0.50, dequantize_4bit and the nested state of its QuantState.
"""

from typing import Literal

import jax
from jaxtyping import Array, Float, Int, UInt8

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.nf4 import reference
from fastft_jax.pallas_kernels.nf4.codebooks import NF4_CODE, dynamic_map
from fastft_jax.pallas_kernels.nf4.reference import in_reach

Implementation = Literal["xla", "triton"]

__all__ = [
    "NF4_CODE",
    "Implementation",
    "decode_into",
    "decode_transposed_into",
    "dequantize",
    "dynamic_map",
    "in_reach",
    "kernel_takes",
]


def kernel_takes(codes: UInt8[Array, "*L G 32"]) -> bool:
    """Whether the kernel is the default for these codes here: on a GPU, if it can address them."""
    return pallas.on_gpu() and in_reach(codes.size)


def decode_into(
    into: Float[Array, "rows width"] | None,
    codes: UInt8[Array, "L G 32"],
    absmax: Float[Array, "L G"] | UInt8[Array, "L G"],
    absmax_scale: Float[Array, "L S"] | None,
    absmax_offset: Float[Array, "L"] | None,
    layer: Int[Array, ""] | int,
    factor: Float[Array, ""] | None = None,
    *,
    shape: tuple[int, int],
    size: tuple[int, int],
    row: int,
    count: int = 1,
    step: int = 0,
    dtype: jax.typing.DTypeLike,
    interpret: bool | None = None,
) -> Float[Array, "rows width"]:
    """Write matrix `layer` of a stack, [N, K] = `shape`, at row `row` and column 0 of a buffer of `size`, in place.

    With `count`, that many matrices from `layer` on, each `step` rows below the one before: a layer's experts.

    `into` None makes the buffer; what is not written holds anything. So one GEMM can have several projections and the
    columns of a LoRA pair in its weight, without a copy. The kernel alone does this; K and the width must be multiples
    of 64 (ValueError otherwise). Values as `dequantize`'s, `factor` included.
    """
    from fastft_jax.pallas_kernels.nf4 import triton

    (n, k), (rows, width) = shape, size
    if k % 64 or width % 64 or k > width or row + (count - 1) * step + n > rows or n * k != 64 * codes.shape[-2]:
        raise ValueError(f"{codes.shape[-2]} blocks as {shape} do not fit row {row} of {size} in blocks of 64")
    out = triton.decode(
        codes,
        absmax,
        absmax_scale,
        absmax_offset,
        layer,
        factor,
        into=into,
        rows=rows,
        pitch=width // 64,
        row=row,
        count=count,
        step=step,
        blocks_a_row=k // 64,
        dtype=dtype,
        interpret=interpret,
    )
    return out.reshape(size)


def decode_transposed_into(
    into: Float[Array, "K width"] | None,
    codes: UInt8[Array, "L G 32"],
    absmax: Float[Array, "L G"] | UInt8[Array, "L G"],
    absmax_scale: Float[Array, "L S"] | None,
    absmax_offset: Float[Array, "L"] | None,
    layer: Int[Array, ""] | int,
    factor: Float[Array, ""] | None = None,
    *,
    shape: tuple[int, int],
    width: int,
    column: int,
    dtype: jax.typing.DTypeLike,
    interpret: bool | None = None,
) -> Float[Array, "K width"]:
    """Write the transpose of matrix `layer` of a stack, [N, K] = `shape`, at a column of a [K, width] buffer, in place.

    `into` None makes the buffer; what is not written holds anything. The kernel alone does this; K must be a multiple
    of 64 (ValueError otherwise). Values as `dequantize`'s, bit for bit.
    """
    from fastft_jax.pallas_kernels.nf4 import triton_transposed

    (n, k) = shape
    if k % 64 or column + n > width or n * k != 64 * codes.shape[-2]:
        raise ValueError(f"{codes.shape[-2]} blocks as {shape} do not fit columns {column} of {width} in blocks of 64")
    stacked = (codes, absmax, absmax_scale, absmax_offset, layer, factor)
    return triton_transposed.decode(
        *stacked, into=into, shape=shape, width=width, column=column, dtype=dtype, interpret=interpret
    )


def dequantize(
    codes: UInt8[Array, "G 32"],
    absmax: Float[Array, "G"] | UInt8[Array, "G"],
    absmax_scale: Float[Array, "S"] | None = None,
    absmax_offset: Float[Array, ""] | None = None,
    factor: Float[Array, ""] | None = None,
    *,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | None = None,
) -> Float[Array, "G 64"]:
    """Decode G blocks of 64 NF4 weights to `dtype` [G, 64].

    absmax is float32, or uint8 with absmax_scale float32 [ceil(G / 256)] and absmax_offset float32 []:
    absmax[g] = map[absmax[g]] * absmax_scale[g // 256] + absmax_offset, both operations rounded. `factor` multiplies
    the float32 absmax, to bring weights into the range of a narrow `dtype`. Both implementations and bitsandbytes on a
    CPU agree bit for bit (float32 values below 2**-126 aside, which XLA on a CPU flushes to zero). `None` picks
    "triton" on a GPU, "xla" elsewhere or where the kernel cannot address the codes. Not differentiable in the kernel:
    quantised weights are frozen. Raises ValueError for shapes, dtypes or names that do not fit.
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
        implementation = "triton" if kernel_takes(codes) else "xla"
    if implementation == "xla":
        return reference.dequantize(codes, absmax, absmax_scale, absmax_offset, dtype, factor)
    if implementation == "triton":
        from fastft_jax.pallas_kernels.nf4 import triton

        return triton.dequantize(codes, absmax, absmax_scale, absmax_offset, dtype, factor)
    raise ValueError(f"unknown NF4 implementation {implementation!r}: use None, 'xla' or 'triton'")
