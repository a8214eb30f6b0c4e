"""Whole rows a program: how kernels that reduce over the last axis cut [M, D] arrays, whatever M and D."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fastft_jax.pallas_kernels import pallas

MAX_WIDTH = 16384
"""Columns a program holds in registers without spilling: 16 a thread up to 8192, 32 above."""
MAX_TRAINED_WIDTH = 8192
"""The same for a program that also sums a weight gradient."""
ELEMENTS_PER_PROGRAM = 4096
"""Short rows share a program until it has this many elements."""
STEPS = 16
"""Tiles that a program sums a weight gradient over: its partial sums are then 1 / 16 of the rows."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: the only sizes a kernel's values may have."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Rows:
    """A [M, D] array as tiles of `rows` rows and `width` columns (D rounded up), `steps` tiles a program."""

    m: int
    d: int
    steps: int = 1

    @property
    def width(self) -> int:
        return power_of_two(self.d)

    @property
    def rows(self) -> int:
        return max(1, ELEMENTS_PER_PROGRAM // self.width)

    @property
    def programs(self) -> int:
        return pallas.cdiv(self.m, self.rows * self.steps)

    @property
    def num_warps(self) -> int:
        return min(16, max(1, self.rows * self.width // 512))

    def spec(self, columns: int | None = None) -> pallas.BlockSpec:
        """A program's rows of an array, seen `columns` wide (`width` by default)."""
        return pallas.BlockSpec((self.rows * self.steps, columns or self.width), lambda i: (i, 0))

    def weight_spec(self) -> pallas.BlockSpec:
        return pallas.BlockSpec((self.width,), lambda i: (0,))

    def partial_spec(self) -> pallas.BlockSpec:
        """One row a program of a [programs, D] array of partial sums."""
        return pallas.BlockSpec((1, self.width), lambda i: (i, 0))

    def columns(self) -> Bool[Array, "width"]:
        return jnp.arange(self.width) < self.d

    def tile(self, step, first: Array) -> tuple[pallas.ds, Bool[Array, "rows width"]]:
        """Slice and mask of a program's tile number `step`; `first` is the program's first row."""
        return pallas.ds(step * self.rows, self.rows), self.existing(step, first) & self.columns()[None, :]

    def existing(self, step, first: Array) -> Bool[Array, "rows 1"]:
        return (first + step * self.rows + jnp.arange(self.rows) < self.m)[:, None]

    def first_row(self) -> Array:
        return pallas.program_id(0) * (self.rows * self.steps)


def roomy(tiles: Rows, room: int) -> int:
    """Columns that a block must have for a kernel to write D columns and, after them, `room` more."""
    return max(tiles.width, tiles.d + power_of_two(room)) if room else tiles.width


def store_row(ref, y: Float[Array, "rows width"], tiles: Rows, inside: Bool[Array, "rows width"], room: int) -> None:
    """Write the one tile of a program, cast to the array's dtype, and zeros in the `room` columns after it."""
    pallas.store(ref.at[:, pallas.ds(0, tiles.width)], y.astype(ref.dtype), mask=inside)
    if room:
        width = power_of_two(room)
        tail = tiles.existing(0, tiles.first_row()) & (jnp.arange(width) < room)[None, :]
        pallas.store(ref.at[:, pallas.ds(tiles.d, width)], jnp.zeros((tiles.rows, width), ref.dtype), mask=tail)
