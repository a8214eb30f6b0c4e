"""Grouped products in Pallas: a tile of rows belongs to one group, whose matrix it is multiplied with.

A group's rows are cut into tiles from its own first row on, the last tile masked, so there are at most M / rows + E of
them, a number known without the sizes; programs beyond the tiles that there are do nothing.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas

BAND = 8  # tiles of columns that one tile of rows meets in a row: about the root of how many tiles run at once


class Tile(NamedTuple):
    """Rows by columns of the result, the depth of one step, and how Triton compiles it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def choose_tile(columns: int, depth: int, dtype, compute_capability: tuple[int, int] | None = None) -> Tile:
    """For a result [any, columns] of sums over `depth`: what fits an L4's 99 KB, and on Hopper twice the columns.

    There 128 x 256 makes each warpgroup's instruction as wide as it can be: 634 TFLOP/s where 128 x 128 reaches 513
    (benchmarks/grouped_tiles.jsonl).
    """
    wide = jnp.dtype(dtype).itemsize == 4
    depth = min(32 if wide else 64, _power_of_two(depth))
    if wide:
        return Tile(64, min(64, _power_of_two(columns)), depth, 8, 3)
    largest = 256 if compute_capability == (9, 0) and -columns % 256 <= columns // 8 else 128
    return Tile(128, min(largest, _power_of_two(columns)), depth, 8, 3)


def _power_of_two(n: int) -> int:
    """At least n, and at least what a matrix unit takes."""
    return max(16, 1 << (n - 1).bit_length())


def _dot(a: Array, b: Array) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _load(ref, row, column, shape: tuple[int, int], last_row=None, width: int | None = None):
    """[rows, columns] from there on, zeros from `last_row` and `width` on; None where the tile ends before."""
    below, left = (
        None if last is None else first + jnp.arange(n) < last
        for first, n, last in zip((row, column), shape, (last_row, width), strict=True)
    )
    at = ref.at[pallas.ds(row, shape[0]), pallas.ds(column, shape[1])]
    if below is None and left is None:
        return pallas.load(at)
    mask = True if below is None else below[:, None]
    mask = jnp.broadcast_to(mask if left is None else mask & left[None], shape)
    return pallas.load(at, mask=mask, other=0)


def _place(units: int, columns: int) -> tuple[Array, Array]:
    """(tile of rows, tile of columns) of this program: those that run at the same time make a square, so that what they
    read together fits the cache."""
    program = pallas.program_id(0)
    band = lax.div(program, BAND * units)
    within, width = program - band * (BAND * units), jnp.minimum(columns - band * BAND, BAND)
    unit = lax.div(within, width)
    return unit, band * BAND + within - unit * width


def _rows_kernel(group_ref, first_ref, last_ref, *refs, depths: tuple[int, ...], n: int, k: int, tile, transposed):
    """out[m] = the sum over pairs (x, w) of x[m] W[e]^T, or of x[m] W[e] if `transposed`; each w_ref is [E n, k] with
    n or k, the one that is summed over, of its own: `depths`."""
    *pairs, out_ref = refs
    width = k if transposed else n
    unit, column = _place(first_ref.shape[0], pallas.cdiv(width, tile.columns))
    column = column * tile.columns
    row, last, group = first_ref[unit], last_ref[unit], group_ref[unit]
    there = jnp.clip(last - row, 0, 1)  # no steps where there are no rows
    total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    for x_ref, w_ref, inner in zip(pairs[0::2], pairs[1::2], depths, strict=True):
        depth = min(tile.depth, _power_of_two(inner))
        ragged, ends = inner % depth > 0, width % tile.columns > 0

        def step(i, total, x_ref=x_ref, w_ref=w_ref, inner=inner, depth=depth, ragged=ragged, ends=ends):
            at = i * depth
            x = _load(x_ref, row, at, (tile.rows, depth), last, inner if ragged else None)
            if transposed:
                last_row, last_column = (group + 1) * inner if ragged else None, k if ends else None
                w = _load(w_ref, group * inner + at, column, (depth, tile.columns), last_row, last_column)
            else:
                last_row, last_column = (group + 1) * n if ends else None, inner if ragged else None
                w = _load(w_ref, group * n + column, at, (tile.columns, depth), last_row, last_column).T
            return total + _dot(x, w)

        total = lax.fori_loop(0, there * pallas.cdiv(inner, depth), step, total)
    mask = (row + jnp.arange(tile.rows) < last)[:, None] & (column + jnp.arange(tile.columns) < width)[None]
    at = out_ref.at[pallas.ds(row, tile.rows), pallas.ds(column, tile.columns)]
    pallas.store(at, total.astype(out_ref.dtype), mask=mask)


def _outer_kernel(first_ref, last_ref, y_ref, x_ref, out_ref, *, n: int, k: int, tile: Tile, columns: int):
    """out[e] = sum of y[m]^T x[m] over the group's rows; a tile is [tile.columns, columns]."""
    group = pallas.program_id(2)
    left, right = pallas.program_id(0) * tile.columns, pallas.program_id(1) * columns
    first, last = first_ref[group], last_ref[group]

    def step(i, total):
        row = first + i * tile.depth
        y = _load(y_ref, row, left, (tile.depth, tile.columns), last, n)
        x = _load(x_ref, row, right, (tile.depth, columns), last, k)
        return total + _dot(y.T, x)

    zero = jnp.zeros((tile.columns, columns), jnp.float32)
    total = lax.fori_loop(0, lax.div(last - first + tile.depth - 1, tile.depth), step, zero)
    mask = (left + jnp.arange(tile.columns) < n)[:, None] & (right + jnp.arange(columns) < k)[None]
    pallas.store(out_ref, total, mask=mask)


def _units(sizes: Int[Array, "E"], rows: int, count: int) -> tuple[Array, Array, Array]:
    """Of each tile of rows: its group, its first row, and where the group's rows end; no rows for tiles too many."""
    ends = jnp.cumsum(sizes)
    tiles = lax.div(sizes + rows - 1, rows)
    before = jnp.cumsum(tiles)
    unit = jnp.arange(count, dtype=jnp.int32)
    group = jnp.sum(unit[:, None] >= before[None], axis=1, dtype=jnp.int32)
    there = group < sizes.shape[0]
    group = jnp.minimum(group, sizes.shape[0] - 1)
    first = (ends - sizes)[group] + (unit - (before - tiles)[group]) * rows
    return group, jnp.where(there, first, 0), jnp.where(there, ends[group], 0)


def _over_rows(x, w, sizes, low_rank, transposed: bool, tile: Tile | None, interpret: bool | None):
    (m, inner), (e, n, k) = x.shape, w.shape
    width = k if transposed else n
    tile = tile or choose_tile(width, inner, x.dtype, pallas.current_device()[1])
    count = pallas.cdiv(m, tile.rows) + e
    whole = lambda *dims: pallas.BlockSpec(dims, lambda *_: (0,) * len(dims))  # noqa: E731
    units = _units(sizes.astype(jnp.int32), tile.rows, count)
    pairs = [(x, w), *([] if low_rank is None else [low_rank])]
    flat = [a for lhs, rhs in pairs for a in (lhs, rhs.astype(x.dtype).reshape(-1, rhs.shape[2]))]
    return pallas.call(
        functools.partial(
            _rows_kernel, depths=tuple(lhs.shape[1] for lhs, _ in pairs), n=n, k=k, tile=tile, transposed=transposed
        ),
        name="grouped_matmul_transposed" if transposed else "grouped_matmul",
        grid=(pallas.cdiv(width, tile.columns) * count,),
        in_specs=[*(whole(count) for _ in units), *(whole(*a.shape) for a in flat)],
        out_specs=whole(m, width),
        out_shape=jax.ShapeDtypeStruct((m, width), x.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
        interpret=interpret,
    )(*units, *flat)


def matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E N K"],
    sizes: Int[Array, "E"],
    low_rank: tuple[Array, Array] | None = None,
    *,
    tile: Tile | None = None,
    interpret: bool | None = None,
) -> Float[Array, "M N"]:
    return _over_rows(x, w, sizes, low_rank, False, tile, interpret)


def transposed(
    y: Float[Array, "M N"],
    w: Float[Array, "E N K"],
    sizes: Int[Array, "E"],
    low_rank: tuple[Array, Array] | None = None,
    *,
    tile: Tile | None = None,
    interpret: bool | None = None,
) -> Float[Array, "M K"]:
    return _over_rows(y, w, sizes, low_rank, True, tile, interpret)


def outer(
    y: Float[Array, "M N"],
    x: Float[Array, "M K"],
    sizes: Int[Array, "E"],
    *,
    interpret: bool | None = None,
) -> Float[Array, "E N K"]:
    (m, n), k, e = y.shape, x.shape[1], sizes.shape[0]
    tile = choose_tile(n, m, x.dtype)
    columns = choose_tile(k, m, x.dtype).columns
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    whole = lambda *dims: pallas.BlockSpec(dims, lambda *_: (0,) * len(dims))  # noqa: E731
    return pallas.call(
        functools.partial(_outer_kernel, n=n, k=k, tile=tile, columns=columns),
        name="grouped_outer",
        grid=(pallas.cdiv(n, tile.columns), pallas.cdiv(k, columns), e),
        in_specs=[whole(e), whole(e), whole(*y.shape), whole(*x.shape)],
        out_specs=pallas.BlockSpec((None, tile.columns, columns), lambda i, j, g: (g, i, j)),
        out_shape=jax.ShapeDtypeStruct((e, n, k), jnp.float32),
        num_warps=4,
        num_stages=tile.stages,
        interpret=interpret,
    )(ends - sizes.astype(jnp.int32), ends, y, x)
