"""What kernels that finish fp8 products share: a program has a tile of them, sums * scale + h b^T."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.rms_norm.rows import power_of_two

LEAST_RANKS = 16
"""The fewest that a tensor core takes."""


class Tiles(NamedTuple):
    """Rows and columns of a program's tile of [M, N], and its warps."""

    rows: int
    columns: int
    num_warps: int

    def programs(self, m: int, n: int) -> int:
        return pallas.cdiv(m, self.rows) * pallas.cdiv(n, self.columns)


class Place(NamedTuple):
    """Where a program's tile lies: first row and column of [M, N], and which of its rows and columns exist."""

    row: Array
    column: Array
    rows: Array
    columns: Array

    @property
    def inside(self) -> Array:
        return self.rows[:, None] & self.columns[None, :]

    @classmethod
    def of(cls, tiles: Tiles, m: int, n: int) -> "Place":
        """Neighbours share rows: what they read of h stays near, and b is as a whole in the second-level cache."""
        across = pallas.cdiv(n, tiles.columns)
        row, column = (pallas.program_id(0) // across * tiles.rows, pallas.program_id(0) % across * tiles.columns)
        return cls(row, column, row + jnp.arange(tiles.rows) < m, column + jnp.arange(tiles.columns) < n)


def load_scaled(refs, place: Place, skipped_rows: Array | int = 0, skipped_columns: int = 0) -> tuple[Array, Array]:
    """The tile of sums and its scales. refs: sums, scale[, h, b]; the sums have rows of other layers above these, and
    may have other columns on the left."""
    sums_ref, scale_ref = refs[:2]
    height, width = place.rows.shape[0], place.columns.shape[0]
    at_n = pallas.ds(skipped_columns + place.column, width)
    sums_ref = sums_ref.at[pallas.ds(skipped_rows + place.row, height), at_n]
    sums = pallas.load(sums_ref, mask=place.inside, other=0.0)
    return sums, pallas.load(scale_ref.at[pallas.ds(place.row, height)], mask=place.rows, other=0.0)


def load_low_rank(
    refs, place: Place, ranks: tuple[int, int], skipped_columns: int = 0, at_a_time: int = 64
) -> Iterator[tuple[Array, Array]]:
    """The tile's rows of h and of b, some ranks at a time: the first are loaded now, the others when they are taken."""
    height, width = place.rows.shape[0], place.columns.shape[0]
    at_m, at_n = pallas.ds(place.row, height), pallas.ds(skipped_columns + place.column, width)

    def load(start: int) -> tuple[Array, Array]:
        count = min(at_a_time, max(LEAST_RANKS, power_of_two(ranks[1] - start)))
        at_r, used = pallas.ds(start, count), (start + jnp.arange(count) < ranks[1])[None, :]
        h = pallas.load(refs[2].at[at_m, at_r], mask=place.rows[:, None] & used, other=0.0)
        return h, pallas.load(refs[3].at[at_n, at_r], mask=place.columns[:, None] & used, other=0.0)

    starts = range(*ranks, at_a_time) if refs[2:] else ()
    return itertools.chain([load(start) for start in starts[:1]], map(load, starts[1:]))


def finished(scaled, low_rank, dtype) -> Float[Array, "rows columns"]:
    """sums * scale + h b^T, rounded to dtype, in float32."""
    sums, scale = scaled
    y = sums.astype(jnp.float32) * scale[:, None]
    for h, b in low_rank:
        precision = lax.Precision.HIGHEST if h.dtype == jnp.float32 else None
        y += lax.dot_general(h, b, (((1,), (1,)), ((), ())), precision, preferred_element_type=jnp.float32)
    return y.astype(dtype).astype(jnp.float32)


def store(ref, place: Place, y: Float[Array, "rows columns"], skipped_columns: int = 0) -> None:
    """Write the tile, cast to the array's dtype."""
    height, width = y.shape
    at = ref.at[pallas.ds(place.row, height), pallas.ds(skipped_columns + place.column, width)]
    pallas.store(at, y.astype(ref.dtype), mask=place.inside)


def whole(a: Array) -> pallas.BlockSpec:
    """All of an array to every program: it finds its tile itself."""
    return pallas.BlockSpec(a.shape, lambda i: (0,) * len(a.shape))
