"""NF4 decoding in one kernel: codes and (double-quantised) scales in, weights out, at about the speed of a copy."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.nf4.codebooks import NF4_CODE, dynamic_map
from fastft_jax.pallas_kernels.nf4.reference import GROUPS_PER_SCALE, in_reach, scale_and_shift

GROUPS_PER_PROGRAM = 32
"""Must divide 256. On an H200, [14336, 4096] to bfloat16: 43-48 us with 32, 45-50 with 64, 52 with 16 (XLA: 81)."""


def _kernel(*refs, double: bool, scaled: bool, groups: int, row: int, step: int, blocks_a_row: int, pitch: int) -> None:
    """One program decodes 32 blocks; refs: layer, codes, absmax[, scale, offset, map], table[, factor][, buffer], out.

    Block g of the matrix is block `(row + g // blocks_a_row) * pitch + g % blocks_a_row` of the buffer it goes to, with
    `step` rows more for each matrix before it: programs are [blocks, matrices].
    """
    layer_ref, codes_ref, absmax_ref, *rest = refs
    out_ref, table_ref = refs[-1], rest[3] if double else rest[0]
    number = pallas.program_id(1)
    layer = layer_ref[0] + number
    first = pallas.program_id(0) * GROUPS_PER_PROGRAM
    block = first + jnp.arange(GROUPS_PER_PROGRAM)
    inside = block < groups
    here = pallas.ds(layer * groups + first, GROUPS_PER_PROGRAM)
    if double:
        scale_ref, offset_ref, map_ref = rest[:3]
        scales = -(-groups // GROUPS_PER_SCALE)
        value = map_ref[pallas.load(absmax_ref.at[here], mask=inside, other=0).astype(jnp.int32)]
        scale = jnp.broadcast_to(scale_ref[layer * scales + first // GROUPS_PER_SCALE], value.shape)
        absmax = scale_and_shift(value, scale, offset_ref[layer])
    else:
        absmax = pallas.load(absmax_ref.at[here], mask=inside, other=0.0)
    if scaled:
        absmax = absmax * rest[4 if double else 1][0]
    halves = jnp.broadcast_to(inside[:, None], (GROUPS_PER_PROGRAM, 32))
    byte = pallas.load(codes_ref.at[here, :], mask=halves, other=0).astype(jnp.int32)
    target = (row + number * step + block // blocks_a_row) * pitch + block % blocks_a_row
    for half, nibble in enumerate((byte >> 4, byte & 15)):
        out = out_ref.at[target[:, None], 32 * half + jnp.arange(32)[None, :]]
        pallas.store(out, (table_ref[nibble] * absmax[:, None]).astype(out_ref.dtype), mask=halves)


def flat_operands(codes, absmax, absmax_scale, absmax_offset, layer, factor) -> list[Array]:
    """What both kernels read, in the order of their refs; stacks are flat, addressed by the layer."""
    lead, groups = codes.shape[:2]
    if not in_reach(codes.size):
        raise ValueError(
            f"the triton NF4 kernel takes less than 2 GiB of codes, or more than 4; got {codes.size:,}: split them"
        )
    operands = [jnp.asarray(layer, jnp.int32).reshape(1), codes.reshape(lead * groups, 32), absmax.reshape(-1)]
    if absmax_scale is not None:
        operands += [absmax_scale.reshape(-1), absmax_offset.reshape(-1), jnp.asarray(dynamic_map())]
    operands.append(jnp.asarray(NF4_CODE))
    return operands if factor is None else [*operands, jnp.asarray(factor, jnp.float32).reshape(1)]


def decode(
    codes: UInt8[Array, "L G 32"],
    absmax: Float[Array, "L G"] | UInt8[Array, "L G"],
    absmax_scale: Float[Array, "L S"] | None,
    absmax_offset: Float[Array, "L"] | None,
    layer: Int[Array, ""] | int,
    factor: Float[Array, ""] | None = None,
    *,
    into: Float[Array, "rows pitch 64"] | None,
    rows: int,
    pitch: int,
    row: int,
    count: int = 1,
    step: int = 0,
    blocks_a_row: int,
    dtype: jax.typing.DTypeLike,
    interpret: bool | None = None,
) -> Float[Array, "rows pitch 64"]:
    """Decode matrix `layer` of a stack into `rows` rows of `pitch` blocks, from row `row` on; the rest stays as it is.
    So are the `count - 1` matrices after it, each `step` rows below the one before.

    `into` is written in place; None makes a new buffer, whose other elements hold anything. `factor` multiplies absmax,
    in float32, before it is used. Reading the stack at an index instead of a slice of it spares a copy of the codes
    where `layer` is a loop's counter.
    """
    groups = codes.shape[1]
    operands = flat_operands(codes, absmax, absmax_scale, absmax_offset, layer, factor)
    out_shape = jax.ShapeDtypeStruct((rows * pitch, 64), dtype)
    aliases = {}
    if into is not None:
        aliases = {len(operands): 0}
        operands.append(into.reshape(out_shape.shape))
    whole = lambda a: pallas.BlockSpec(a.shape, lambda *_: (0,) * len(a.shape))  # noqa: E731
    double = absmax_scale is not None
    flat = pallas.call(
        functools.partial(
            _kernel,
            double=double,
            scaled=factor is not None,
            groups=groups,
            row=row,
            step=step,
            blocks_a_row=blocks_a_row,
            pitch=pitch,
        ),
        name="nf4_dequantize_double" if double else "nf4_dequantize",
        grid=(pallas.cdiv(groups, GROUPS_PER_PROGRAM), count),
        in_specs=[whole(a) for a in operands],
        out_specs=whole(out_shape),
        out_shape=out_shape,
        input_output_aliases=aliases,
        interpret=interpret,
    )(*operands)
    return flat.reshape(rows, pitch, 64)


def dequantize(
    codes: UInt8[Array, "G 32"],
    absmax: Float[Array, "G"] | UInt8[Array, "G"],
    absmax_scale: Float[Array, "S"] | None,
    absmax_offset: Float[Array, ""] | None,
    dtype: jax.typing.DTypeLike,
    factor: Float[Array, ""] | None = None,
    interpret: bool | None = None,
) -> Float[Array, "G 64"]:
    """All G blocks, one after the other."""
    stacked = [None if a is None else a[None] for a in (codes, absmax, absmax_scale, absmax_offset)]
    groups = codes.shape[0]
    place = dict(into=None, rows=1, pitch=groups, row=0, blocks_a_row=groups)
    out = decode(*stacked, 0, factor, **place, dtype=dtype, interpret=interpret)
    return out[0]
