"""NF4 decoding in one kernel: codes and (double-quantised) scales in, weights out, at about the speed of a copy."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.nf4.codebooks import NF4_CODE, dynamic_map
from fastft_jax.pallas_kernels.nf4.reference import GROUPS_PER_SCALE, scale_and_shift

GROUPS_PER_PROGRAM = 32
"""Must divide 256. On an H200, [14336, 4096] to bfloat16: 43-48 us with 32, 45-50 with 64, 52 with 16 (XLA: 81)."""
MAX_CODE_BYTES = 2**31
"""Pallas's offsets are 32-bit for arrays up to 4 GiB, and signed: a byte array must stay below 2 GiB."""


def _write(codes_ref, table_ref, out_ref, absmax, inside) -> None:
    """Decode a tile of codes, [groups, 32] bytes to [groups, 64] weights; `inside` masks the rows that exist."""
    halves = jnp.broadcast_to(inside[:, None], codes_ref.shape)
    byte = pallas.load(codes_ref, mask=halves, other=0).astype(jnp.int32)
    for half, nibble in enumerate((byte >> 4, byte & 15)):
        out = out_ref.at[:, pallas.ds(32 * half, 32)]
        pallas.store(out, (table_ref[nibble] * absmax[:, None]).astype(out_ref.dtype), mask=halves)


def _plain_kernel(codes_ref, absmax_ref, table_ref, out_ref, *, groups: int) -> None:
    inside = pallas.program_id(0) * GROUPS_PER_PROGRAM + jnp.arange(GROUPS_PER_PROGRAM) < groups
    _write(codes_ref, table_ref, out_ref, pallas.load(absmax_ref, mask=inside, other=0.0), inside)


def _double_kernel(codes_ref, absmax_ref, scale_ref, offset_ref, map_ref, table_ref, out_ref, *, groups: int) -> None:
    inside = pallas.program_id(0) * GROUPS_PER_PROGRAM + jnp.arange(GROUPS_PER_PROGRAM) < groups
    value = map_ref[pallas.load(absmax_ref, mask=inside, other=0).astype(jnp.int32)]
    scale = jnp.broadcast_to(scale_ref[0], value.shape)
    _write(codes_ref, table_ref, out_ref, scale_and_shift(value, scale, offset_ref[0]), inside)


def dequantize(
    codes: UInt8[Array, "G 32"],
    absmax: Float[Array, "G"] | UInt8[Array, "G"],
    absmax_scale: Float[Array, "S"] | None,
    absmax_offset: Float[Array, ""] | None,
    dtype: jax.typing.DTypeLike,
    interpret: bool | None = None,
) -> Float[Array, "G 64"]:
    """A program decodes 32 blocks, all under one scale of a double-quantised absmax (256 is a multiple of 32)."""
    groups = codes.shape[0]
    if codes.size >= MAX_CODE_BYTES:
        raise ValueError(
            f"the triton NF4 kernel takes less than 2 GiB of codes, got {codes.size:,} bytes: split the matrix"
        )
    rows = lambda *tail: pallas.BlockSpec((GROUPS_PER_PROGRAM, *tail), lambda i: (i, *[0] * len(tail)))  # noqa: E731
    whole = lambda n: pallas.BlockSpec((n,), lambda i: (0,))  # noqa: E731
    table = (jnp.asarray(NF4_CODE), whole(16))
    if absmax_scale is None:
        kernel, name = _plain_kernel, "nf4_dequantize"
        operands = [(codes, rows(32)), (absmax, rows()), table]
    else:
        kernel, name = _double_kernel, "nf4_dequantize_double"
        one_scale = pallas.BlockSpec((1,), lambda i: (i * GROUPS_PER_PROGRAM // GROUPS_PER_SCALE,))
        operands = [
            (codes, rows(32)),
            (absmax, rows()),
            (absmax_scale, one_scale),
            (absmax_offset.reshape(1), whole(1)),
            (jnp.asarray(dynamic_map()), whole(256)),
            table,
        ]
    arrays, specs = zip(*operands, strict=True)
    return pallas.call(
        functools.partial(kernel, groups=groups),
        name=name,
        grid=(pallas.cdiv(groups, GROUPS_PER_PROGRAM),),
        in_specs=list(specs),
        out_specs=rows(64),
        out_shape=jax.ShapeDtypeStruct((groups, 64), dtype),
        interpret=interpret,
    )(*arrays)
