"""NF4 decoding that writes the transpose.

fp8 tensor cores want both operands' rows along the contracted axis, and the gradient dY W contracts the rows of W.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.nf4.reference import GROUPS_PER_SCALE, scale_and_shift
from fastft_jax.pallas_kernels.nf4.triton import flat_operands

ROWS = 128
"""Rows of W a program: as many bytes it writes side by side."""
BLOCKS = 4
"""Blocks of each of these rows: the 128 bytes of a cache line of codes."""


def _kernel(*refs, double: bool, scaled: bool, groups: int, n: int, column: int, blocks_a_row: int) -> None:
    """One program decodes 128 rows by 4 blocks; refs as the other kernel's. Block j of row r is at [64 j.., r]."""
    layer_ref, codes_ref, absmax_ref, *rest = refs
    out_ref, table_ref = refs[-1], rest[3] if double else rest[0]
    layer = layer_ref[0]
    first_block = pallas.program_id(0) * BLOCKS
    row = pallas.program_id(1) * ROWS + jnp.arange(ROWS)
    byte_at = jnp.arange(32)
    for step in range(BLOCKS):
        j = first_block + step
        inside = (row < n) & (j < blocks_a_row)
        block = jnp.where(inside, row * blocks_a_row + j, 0)  # unmasked gathers stay inside, too
        here = layer * groups + block
        if double:
            scale_ref, offset_ref, map_ref = rest[:3]
            value = map_ref[pallas.load(absmax_ref.at[here], mask=inside, other=0).astype(jnp.int32)]
            scale = scale_ref[layer * -(-groups // GROUPS_PER_SCALE) + block // GROUPS_PER_SCALE]
            absmax = scale_and_shift(value, scale, offset_ref[layer])
        else:
            absmax = pallas.load(absmax_ref.at[here], mask=inside, other=0.0)
        if scaled:
            absmax = absmax * rest[4 if double else 1][0]
        tile = jnp.broadcast_to(inside[:, None], (ROWS, 32))
        byte = pallas.load(codes_ref.at[here[:, None], byte_at[None, :]], mask=tile, other=0).astype(jnp.int32)
        for half, nibble in enumerate((byte >> 4, byte & 15)):
            w = (table_ref[nibble] * absmax[:, None]).astype(out_ref.dtype)
            out = out_ref.at[64 * j + 32 * half + byte_at[:, None], column + row[None, :]]
            pallas.store(out, w.T, mask=jnp.broadcast_to(inside[None, :], (32, ROWS)))


def decode(
    codes: UInt8[Array, "L G 32"],
    absmax: Float[Array, "L G"] | UInt8[Array, "L G"],
    absmax_scale: Float[Array, "L S"] | None,
    absmax_offset: Float[Array, "L"] | None,
    layer: Int[Array, ""] | int,
    factor: Float[Array, ""] | None,
    *,
    into: Float[Array, "K width"] | None,
    shape: tuple[int, int],
    width: int,
    column: int,
    dtype: jax.typing.DTypeLike,
    interpret: bool | None = None,
) -> Float[Array, "K width"]:
    """Write the transpose of matrix `layer`, [N, K] = `shape`, from column `column` on; the rest is left as it is."""
    n, k = shape
    operands = flat_operands(codes, absmax, absmax_scale, absmax_offset, layer, factor)
    out_shape = jax.ShapeDtypeStruct((k, width), dtype)
    aliases = {}
    if into is not None:
        aliases = {len(operands): 0}
        operands.append(into)
    whole = lambda a: pallas.BlockSpec(a.shape, lambda i, j: (0,) * len(a.shape))  # noqa: E731
    double = absmax_scale is not None
    numbers = dict(groups=codes.shape[1], n=n, column=column, blocks_a_row=k // 64)
    return pallas.call(
        functools.partial(_kernel, double=double, scaled=factor is not None, **numbers),
        name="nf4_dequantize_double_transposed" if double else "nf4_dequantize_transposed",
        grid=(pallas.cdiv(k // 64, BLOCKS), pallas.cdiv(n, ROWS)),  # neighbours read neighbouring codes
        in_specs=[whole(a) for a in operands],
        out_specs=whole(out_shape),
        out_shape=out_shape,
        input_output_aliases=aliases,
        num_warps=8,
        interpret=interpret,
    )(*operands)
