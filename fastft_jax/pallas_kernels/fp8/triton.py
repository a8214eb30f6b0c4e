"""Scaling rows to 8 bits, where a row stays in registers between its maximum and its rounding; and scaling back."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.fp8.reference import DTYPES, LARGEST, Format, scales

CHUNK = 4096
"""Columns of one value: 7 such hold the 28672 columns of an 8B model's widest row, where one would be 32768 wide."""
TILE_M, TILE_N = 64, 128
RANKS = 64
"""Ranks of a low-rank product taken at a time: its widths are multiples of it."""


def _quantise_kernel(x_ref, x8_ref, scale_ref, *, columns: int, chunk: int, largest: float) -> None:
    """One program scales one row."""
    pieces, widest = [], jnp.zeros((1, chunk), jnp.float32)
    for first in range(0, columns, chunk):
        here, inside = pallas.ds(first, chunk), (first + jnp.arange(chunk) < columns)[None, :]
        pieces.append((here, inside, pallas.load(x_ref.at[:, here], mask=inside, other=0.0)))
        widest = jnp.maximum(widest, jnp.abs(pieces[-1][2].astype(jnp.float32)))
    scale, factor = scales(jnp.max(widest, axis=1), largest)
    scale_ref[...] = scale
    for here, inside, x in pieces:
        x8 = (x.astype(jnp.float32) * factor[:, None]).astype(x8_ref.dtype)
        pallas.store(x8_ref.at[:, here], x8, mask=inside)


def quantise_rows(
    x: Float[Array, "M any"], columns: int, format: Format, interpret: bool | None = None
) -> tuple[Float[Array, "M K"], Float[Array, "M"]]:
    """A program a row; the columns beyond the first `columns` are not read."""
    m = x.shape[0]
    width = 1 << (columns - 1).bit_length()
    chunk = min(CHUNK, width)
    row = pallas.BlockSpec((1, pallas.cdiv(columns, chunk) * chunk), lambda i: (i, 0))
    return pallas.call(
        functools.partial(_quantise_kernel, columns=columns, chunk=chunk, largest=LARGEST[format]),
        name=f"fp8_quantise_rows_{format}",
        grid=(m,),
        in_specs=[row],
        out_specs=[row, pallas.BlockSpec((1,), lambda i: (i,))],
        out_shape=[jax.ShapeDtypeStruct((m, columns), DTYPES[format]), jax.ShapeDtypeStruct((m,), jnp.float32)],
        num_warps=min(16, max(1, width // 1024)),
        interpret=interpret,
    )(x)


def _rescale_kernel(sums_ref, scale_ref, h_ref, b_ref, out_ref, *, m: int, n: int, r: int) -> None:
    there_m = (pallas.program_id(0) * TILE_M + jnp.arange(TILE_M) < m)[:, None]
    there_n = pallas.program_id(1) * TILE_N + jnp.arange(TILE_N) < n
    scale = pallas.load(scale_ref, mask=there_m[:, 0], other=0.0)
    tile = there_m & there_n[None, :]
    y = pallas.load(sums_ref, mask=tile, other=0.0).astype(jnp.float32) * scale[:, None]
    precision = lax.Precision.HIGHEST if h_ref.dtype == jnp.float32 else None
    for first in range(0, r, RANKS):
        ranks = pallas.ds(first, RANKS)
        h = pallas.load(h_ref.at[:, ranks], mask=jnp.broadcast_to(there_m, (TILE_M, RANKS)), other=0.0)
        b = pallas.load(b_ref.at[:, ranks], mask=jnp.broadcast_to(there_n[:, None], (TILE_N, RANKS)), other=0.0)
        y += lax.dot_general(h, b, (((1,), (1,)), ((), ())), precision, preferred_element_type=jnp.float32)
    pallas.store(out_ref, y.astype(out_ref.dtype), mask=tile)


def rescale_add(
    sums: Float[Array, "M N"],
    scale: Float[Array, "M"],
    h: Float[Array, "M R"],
    b: Float[Array, "N R"],
    interpret: bool | None = None,
) -> Float[Array, "M N"]:
    """A program a tile; in the place of `sums` where the dtypes agree."""
    (m, n), r = sums.shape, h.shape[1]
    tile = pallas.BlockSpec((TILE_M, TILE_N), lambda i, j: (i, j))
    return pallas.call(
        functools.partial(_rescale_kernel, m=m, n=n, r=r),
        name="fp8_rescale_add",
        grid=(pallas.cdiv(m, TILE_M), pallas.cdiv(n, TILE_N)),
        in_specs=[
            tile,
            pallas.BlockSpec((TILE_M,), lambda i, j: (i,)),
            pallas.BlockSpec((TILE_M, r), lambda i, j: (i, 0)),
            pallas.BlockSpec((TILE_N, r), lambda i, j: (j, 0)),
        ],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct((m, n), h.dtype),
        input_output_aliases={0: 0} if sums.dtype == h.dtype else {},
        num_stages=1,
        interpret=interpret,
    )(sums, scale, h, b)
