"""Scaling rows to 8 bits, where a row stays in registers between its maximum and its rounding; and scaling back."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.fp8.reference import DTYPES, LARGEST, Format, scales
from fastft_jax.pallas_kernels.fp8.tile import Place, Tiles, finished, load_low_rank, load_scaled, store, whole

CHUNK = 4096
"""Columns of one value: 7 such hold the 28672 columns of an 8B model's widest row, where one would be 32768 wide."""
RESCALE = Tiles(64, 128, 8)


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


def _rescale_kernel(sums_ref, scale_ref, h_ref, b_ref, out_ref, *, tiles: Tiles, m: int, n: int, r: int) -> None:
    place, refs = Place.of(tiles, m, n), (sums_ref, scale_ref, h_ref, b_ref)
    y = finished(load_scaled(refs, place), load_low_rank(refs, place, (0, r)), out_ref.dtype)
    store(out_ref, place, y)


def rescale_add(
    sums: Float[Array, "M N"],
    scale: Float[Array, "M"],
    h: Float[Array, "M R"],
    b: Float[Array, "N R"],
    tiles: Tiles = RESCALE,
    interpret: bool | None = None,
) -> Float[Array, "M N"]:
    """A program a tile; in the place of `sums` where the dtypes agree."""
    (m, n), r = sums.shape, h.shape[1]
    return pallas.call(
        functools.partial(_rescale_kernel, tiles=tiles, m=m, n=n, r=r),
        name="fp8_rescale_add",
        grid=(tiles.programs(m, n),),
        in_specs=[whole(a) for a in (sums, scale, h, b)],
        out_specs=whole(sums),
        out_shape=jax.ShapeDtypeStruct((m, n), h.dtype),
        input_output_aliases={0: 0} if sums.dtype == h.dtype else {},
        num_warps=tiles.num_warps,
        num_stages=1,
        interpret=interpret,
    )(sums, scale, h, b)
