"""Up to 4 rows times NF4 in Pallas, on integers (see `fixed_point`). A first kernel brings x into fixed point.

A thread holds 16 bytes of codes, half a block, of each row of its tile: 32 products to a row of x, whose integer sum is
scaled by the block's absmax and x's step and added in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.nf4.codebooks import dynamic_map
from fastft_jax.pallas_kernels.nf4.reference import GROUPS_PER_SCALE
from fastft_jax.pallas_kernels.quantised_matmul import fixed_point, tiles

PLANES = 17
"""int32 a row of x and half block: 8 of x's high bytes, 8 of its low ones, as `fixed_point.multiply` has them; bias."""
SCALE_SHIFT = GROUPS_PER_SCALE.bit_length() - 1
"""Divides by it: a division of signed numbers takes more than a shift."""
HALVES = 8
"""Half blocks of x a program of the quantising kernel."""


def _quantise_kernel(x_ref, planes_ref, step_ref, *, halves: int):
    first = pallas.program_id(1) * HALVES
    half, t = first + jnp.arange(HALVES)[:, None], jnp.arange(32)[None]
    # nibble j of a word belongs to byte j // 2: the first 32 elements of a block lie in the high nibbles, j odd
    word, j = t // 8, t % 8
    place = half // 2 * 64 + half % 2 * 16 + word * 4 + j // 2 + 32 * (1 - j % 2)
    x = x_ref[jnp.where(half < halves, place, 0)].astype(jnp.float32)
    # the largest |x|, compared as integers, by which NaN is larger than all: a float32 maximum may skip it
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    peak = jax.lax.bitcast_convert_type(jnp.max(bits, axis=1), jnp.float32)
    x = jnp.floor(x / jnp.where(peak == 0, 1.0, peak)[:, None] * fixed_point.X_LEVELS + 0.5).astype(jnp.int32)
    high, low = fixed_point.split_x(x)
    here, there = pallas.ds(first, HALVES), first + jnp.arange(HALVES) < halves
    for s, part in enumerate((high, low)):
        packed = jnp.sum(((part & 255) << (8 * (j % 4))).reshape(HALVES, 8, 4), axis=2)
        pallas.store(planes_ref.at[pallas.ds(8 * s, 8), here], packed.T, mask=there[None])
    pallas.store(planes_ref.at[pallas.ds(PLANES - 1, 1), here], fixed_point.bias(x)[None], mask=there[None])
    pallas.store(step_ref.at[here], peak * fixed_point.TOTAL_UNIT, mask=there)


def quantise_x(
    x: Float[Array, "M K"], *, interpret: bool | None = None
) -> tuple[Int32[Array, "M*17 K//32"], Float32[Array, "M K//32"]]:
    """x in fixed point, in the order of the codes, and what a unit of a half block's integer sum stands for."""
    (m, k), halves = x.shape, x.shape[1] // 32
    row = lambda *dims: pallas.BlockSpec((None, *dims), lambda i, _: (i,) + (0,) * len(dims))  # noqa: E731
    planes, step = pallas.call(
        functools.partial(_quantise_kernel, halves=halves),
        name="quantised_matvec_x",
        grid=(m, pallas.cdiv(halves, HALVES)),
        in_specs=[row(k)],
        out_specs=[row(PLANES, halves), row(halves)],
        out_shape=[
            jax.ShapeDtypeStruct((m, PLANES, halves), jnp.int32),
            jax.ShapeDtypeStruct((m, halves), jnp.float32),
        ],
        num_warps=1,
        num_stages=1,
        interpret=interpret,
    )(x)
    return planes.reshape(m * PLANES, halves), step


def lookup_table(blocks: int) -> Int32[Array, "4 halves"]:
    """`fixed_point.TABLE` for every lane: what all lanes load from one address is kept where `prmt` cannot read it."""
    return jnp.asarray(np.repeat(fixed_point.TABLE[:, None], 2 * blocks, axis=1))


def _load_absmax(layer, absmax_ref, decoder, row, first, rows: int, blocks: int, n: int, groups: int):
    """[rows, 2 blocks], a block's for each of its halves, and their scales; outside the matrix, some other block's."""
    r = row + jnp.arange(rows)[:, None]
    block = first + jnp.arange(2 * blocks)[None] // 2
    group = r * groups + block
    if n % rows or groups % blocks:
        group = jnp.where((r < n) & (block < groups), group, 0)
    absmax = absmax_ref[layer * (n * groups) + group]
    if not decoder:
        return absmax, None
    if n % rows == 0 and GROUPS_PER_SCALE % groups == 0:  # one scale for all of a row
        group = r * groups
    elif n % rows == 0 and groups % blocks == 0 and GROUPS_PER_SCALE % blocks == 0:  # one for a row's blocks here
        group = r * groups + first
    scales = pallas.cdiv(n * groups, GROUPS_PER_SCALE)
    return absmax, decoder[1][layer * scales + (group >> SCALE_SHIFT)]


def _kernel(
    table_ref, planes_ref, step_ref, layer_ref, words_ref, absmax_ref, *rest,
    m: int, n: int, groups: int, tile: tiles.VectorTiles, interpret: bool,
):  # fmt: skip
    *decoder, out_ref = rest
    rows, blocks, _, split_low = tile
    row, layer = pallas.program_id(0) * rows, layer_ref[0]
    r = row + jnp.arange(rows)
    table = [pallas.load(table_ref.at[pallas.ds(i, 1), :]) for i in range(4)]

    def step(i, sums):
        first = i * blocks
        mask, mask_k, other = None, None, None
        if n % rows or groups % blocks:  # masks cost instructions: only where a tile leaves the matrix
            other = 0
            mask_k = (first * 2 + jnp.arange(2 * blocks) < groups * 2)[None]
            mask = (r < n)[:, None] & (first * 8 + jnp.arange(8 * blocks) < groups * 8)[None]
        at = lambda ref, j: pallas.load(  # noqa: E731
            ref.at[pallas.ds(j, 1), pallas.ds(first * 2, 2 * blocks)], mask=mask_k, other=other
        )
        here = words_ref.at[pallas.ds(layer * n + row, rows), pallas.ds(first * 8, blocks * 8)]
        words = pallas.load(here, mask=mask, other=other).reshape(rows, 2 * blocks, 2, 2)
        even, odd = (jnp.unstack(pair, axis=-1) for pair in jnp.unstack(words, axis=-1))
        words = [even[0], odd[0], even[1], odd[1]]
        absmax, scale = _load_absmax(layer, absmax_ref, decoder, row, first, rows, blocks, n, groups)
        if not interpret:
            pallas.barrier()  # or the assembler delays half of the loads, to save registers
        if decoder:
            map_ref, _, offset_ref = decoder
            absmax = map_ref[absmax.astype(jnp.int32)] * scale + offset_ref[layer]
        more = []
        for j, total in enumerate(sums):
            # each row of x looks the codes up anew, in the source: the assembler does it once
            *x, bias = (at(planes_ref, j * PLANES + plane) for plane in range(PLANES))
            part = fixed_point.multiply(words, x, bias, table, split_low=split_low, interpret=interpret)
            more.append(total + part.astype(jnp.float32) * at(step_ref, j) * absmax)  # no product of two small
        return tuple(more)

    zero = jnp.zeros((rows, 2 * blocks), jnp.float32)
    sums = jax.lax.fori_loop(0, pallas.cdiv(groups, blocks), step, (zero,) * m)
    for j, total in enumerate(sums):
        value = jnp.sum(total, axis=1)[None].astype(out_ref.dtype)
        pallas.store(out_ref.at[pallas.ds(j, 1), :], value, mask=(r < n)[None])


def quantised_matvec(
    x: Float[Array, "M K"],
    codes: UInt8[Array, "L G 32"],
    absmax: Float[Array, "L G"] | UInt8[Array, "L G"],
    absmax_scale: Float[Array, "L S"] | None,
    absmax_offset: Float[Array, "L"] | None,
    layer: Int[Array, ""] | int = 0,
    *,
    shape: tuple[int, int],
    tile: tiles.VectorTiles | None = None,
    interpret: bool | None = None,
) -> Float[Array, "M N"]:
    """x W^T for matrix `layer` of a stack; M in 1..4, x bfloat16 or float16, K a multiple of 64."""
    (m, k), n, groups = x.shape, shape[0], shape[1] // 64
    tile = tile or tiles.vector_tiles(m, n, k)
    interpret = not pallas.on_gpu() if interpret is None else interpret
    arrays = [lookup_table(tile.blocks), *quantise_x(x, interpret=interpret), jnp.asarray(layer, jnp.int32).reshape(1)]
    arrays += [tiles.words(codes, k), absmax.reshape(-1)]
    if absmax_scale is not None:
        arrays += [jnp.asarray(dynamic_map()), absmax_scale.reshape(-1), absmax_offset]
    whole = lambda *dims: pallas.BlockSpec(dims, lambda _: (0,) * len(dims))  # noqa: E731
    return pallas.call(
        functools.partial(_kernel, m=m, n=n, groups=groups, tile=tile, interpret=interpret),
        name="quantised_matvec",
        grid=(pallas.cdiv(n, tile.rows),),
        in_specs=[whole(*a.shape) for a in arrays],
        out_specs=pallas.BlockSpec((m, tile.rows), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        num_warps=tile.warps,
        num_stages=1,
        interpret=interpret,
    )(*arrays)
