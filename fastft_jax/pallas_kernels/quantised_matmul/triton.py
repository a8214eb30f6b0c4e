"""5 to 64 rows times NF4 in Pallas: codes are looked up in a 16-entry table, a gather that the L1 cache serves.

A tile of W is decoded to x.dtype, exactly as `nf4.dequantize` does, and multiplied on the matrix units with x padded to
16, 32 or 64 rows. Fewer rows are `few_rows`'s.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.nf4.codebooks import NF4_CODE, dynamic_map
from fastft_jax.pallas_kernels.nf4.reference import GROUPS_PER_SCALE, scale_and_shift
from fastft_jax.pallas_kernels.quantised_matmul import few_rows, tiles


def _load_tile(layer_ref, words_ref, absmax_ref, decoder, row, first, rows: int, blocks: int, n: int, groups: int):
    """Words [rows, 8 blocks] and float32 absmax [rows, blocks], zero outside the matrix; `row`: the program's first."""
    layer = layer_ref[0]
    here = pallas.ds(layer * n + row, rows)
    there = row + jnp.arange(rows) < n
    mask = there[:, None] & (first * 8 + jnp.arange(blocks * 8) < groups * 8)[None]
    words = pallas.load(words_ref.at[here, pallas.ds(first * 8, blocks * 8)], mask=mask, other=0)
    block = first + jnp.arange(blocks)
    inside = there[:, None] & (block < groups)[None]
    absmax = pallas.load(absmax_ref.at[here, pallas.ds(first, blocks)], mask=inside, other=0)
    if decoder:
        map_ref, scale_ref, offset_ref = decoder
        group = (row + jnp.arange(rows))[:, None] * groups + block[None]
        scales = pallas.cdiv(n * groups, GROUPS_PER_SCALE)
        scale = scale_ref[layer * scales + jnp.where(inside, group, 0) // GROUPS_PER_SCALE]
        absmax = jnp.where(inside, scale_and_shift(map_ref[absmax.astype(jnp.int32)], scale, offset_ref[layer]), 0.0)
    return words, absmax


def _dot_kernel(x_ref, table_ref, layer_ref, words_ref, absmax_ref, *rest, m: int, n: int, groups: int, tile):
    *decoder, out_ref = rest
    rows, blocks, padded_m, _, steps, _ = tile
    row = pallas.program_id(0) * rows
    begin = pallas.program_id(1) * steps * blocks
    there_m = jnp.arange(padded_m) < m

    def step(i, total):
        first = begin + i * blocks
        words, absmax = _load_tile(layer_ref, words_ref, absmax_ref, decoder, row, first, rows, blocks, n, groups)
        inside = there_m[:, None] & (first * 64 + jnp.arange(blocks * 64) < groups * 64)[None]
        x = pallas.load(x_ref.at[:, pallas.ds(first * 64, blocks * 64)], mask=inside, other=0.0)
        factor = jnp.broadcast_to(absmax[:, :, None], (rows, blocks, 8)).reshape(rows, blocks * 8)
        w = [(table_ref[(words >> shift) & 15] * factor).astype(x.dtype) for shift in tiles.SHIFTS]
        pair = lambda a, b: jnp.stack([a, b], axis=-1)  # noqa: E731
        # a Triton value can only be joined pair by pair; in this order, code p lands at position p of its word
        w = pair(pair(pair(w[0], w[4]), pair(w[2], w[6])), pair(pair(w[1], w[5]), pair(w[3], w[7])))
        w = w.reshape(rows, blocks * 64)
        return total + jax.lax.dot_general(w, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((rows, padded_m), jnp.float32))
    mask = there_m[:, None] & (row + jnp.arange(rows) < n)[None]
    pallas.store(out_ref, total.T, mask=mask)


def quantised_matmul(
    x: Float[Array, "M K"],
    codes: UInt8[Array, "L G 32"],
    absmax: Float[Array, "L G"] | UInt8[Array, "L G"],
    absmax_scale: Float[Array, "L S"] | None,
    absmax_offset: Float[Array, "L"] | None,
    layer: Int[Array, ""] | int = 0,
    *,
    shape: tuple[int, int],
    interpret: bool | None = None,
) -> Float[Array, "M N"]:
    """x W^T for matrix `layer` of a stack; M in 1..64, x bfloat16 or float16, K a multiple of 64.

    Above 4 rows it goes by way of float32 sums [splits, M, N].
    """
    (m, k), n, groups = x.shape, shape[0], shape[1] // 64
    if m <= tiles.VECTOR_ROWS:
        weight = codes, absmax, absmax_scale, absmax_offset
        return few_rows.quantised_matvec(x, *weight, layer, shape=shape, interpret=interpret)
    whole = lambda *dims: pallas.BlockSpec(dims, lambda *_: (0,) * len(dims))  # noqa: E731
    tile = tiles.dot_tiles(m, n, k)
    weight = [jnp.asarray(NF4_CODE), jnp.asarray(layer, jnp.int32).reshape(1)]
    weight += [tiles.words(codes, k), absmax.reshape(-1, groups)]
    if absmax_scale is not None:
        weight += [jnp.asarray(dynamic_map()), absmax_scale.reshape(-1), absmax_offset]
    sums = pallas.call(
        functools.partial(_dot_kernel, m=m, n=n, groups=groups, tile=tile),
        name="quantised_matmul",
        grid=(pallas.cdiv(n, tile.rows), tile.splits),
        # of x, more rows are loaded (and masked) than there are
        in_specs=[whole(tile.padded_m, k), *(whole(*a.shape) for a in weight)],
        out_specs=pallas.BlockSpec((None, tile.padded_m, tile.rows), lambda i, s: (s, 0, i)),
        out_shape=jax.ShapeDtypeStruct((tile.splits, m, n), jnp.float32),
        num_warps=tile.warps,
        num_stages=1,  # Triton's pipelining would turn the table's gather into copies of 4 bytes
        interpret=interpret,
    )(tiles.x_interleaved(x), *weight)
    return jnp.sum(sums, axis=0).astype(x.dtype)
