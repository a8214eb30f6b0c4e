"""RMSNorm's kernel with one more result: a program has whole rows in registers, so their scales are at hand."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.fp8.reference import DTYPES, LARGEST, scales
from fastft_jax.pallas_kernels.rms_norm.rows import Rows, roomy, store_row
from fastft_jax.pallas_kernels.rms_norm.triton import normalised


def _kernel(x_ref, weight_ref, y_ref, y8_ref, scale_ref, *, tiles: Rows, eps: float, plus_one: bool, room: int) -> None:
    first = tiles.first_row()
    _, inside = tiles.tile(0, first)
    x = pallas.load(x_ref, mask=inside, other=0.0)
    y = normalised(x, weight_ref, tiles, eps, plus_one).astype(y_ref.dtype)
    store_row(y_ref, y, tiles, inside, room)
    y = y.astype(jnp.float32)  # what a reader of y would scale
    scale, factor = scales(jnp.max(jnp.abs(y), axis=1), LARGEST["e4m3"])
    pallas.store(y8_ref, (y * factor[:, None]).astype(y8_ref.dtype), mask=inside)
    pallas.store(scale_ref, scale, mask=first + jnp.arange(tiles.rows) < tiles.m)


def forward(
    x: Float[Array, "M D"],
    weight: Float[Array, "D"],
    *,
    eps: float,
    plus_one: bool = False,
    room: int = 0,
    interpret: bool | None = None,
) -> tuple[Float[Array, "M D+room"], Float[Array, "M D"], Float[Array, "M"]]:
    m, d = x.shape
    tiles = Rows(m, d)
    return pallas.call(
        functools.partial(_kernel, tiles=tiles, eps=eps, plus_one=plus_one, room=room),
        name="fp8_rms_norm",
        grid=(tiles.programs,),
        in_specs=[tiles.spec(), tiles.weight_spec()],
        out_specs=[tiles.spec(roomy(tiles, room)), tiles.spec(), pallas.BlockSpec((tiles.rows,), lambda i: (i,))],
        out_shape=[
            jax.ShapeDtypeStruct((m, d + room), x.dtype),
            jax.ShapeDtypeStruct((m, d), DTYPES["e4m3"]),
            jax.ShapeDtypeStruct((m,), jnp.float32),
        ],
        num_warps=tiles.num_warps,
        interpret=interpret,
    )(x, weight)
