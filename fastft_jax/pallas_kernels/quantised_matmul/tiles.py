"""How both kernels see a product: 32-bit words of eight codes, x in the order of those words, and the tile sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

MAX_ROWS = 64
VECTOR_ROWS = 4
"""Up to so many rows multiply on the CUDA cores (`few_rows`), more on the matrix units."""
MAX_CODE_BYTES = 2**31
"""The kernels' offsets are signed 32-bit."""

SHIFTS = (4, 12, 20, 28, 0, 8, 16, 24)
"""Bits by which a word is shifted right to bring code p = 4 half + t to its low nibble: byte t holds element t of the
first 32 in its high nibble and element t of the second 32 in its low one (words are little-endian)."""


def supported(rows: int, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, layers: int = 1) -> bool:
    """Whether the kernels take this product (on a GPU), of a stack of so many layers; the rest is the reference's."""
    n, k = shape
    kind = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return kind and 1 <= rows <= MAX_ROWS and k % 64 == 0 and 0 < layers * n * k // 2 < MAX_CODE_BYTES


def words(codes: UInt8[Array, "L G 32"], k: int) -> Int32[Array, "L*N K//8"]:
    """The same bytes, four at a time: a view, XLA copies nothing."""
    return jax.lax.bitcast_convert_type(codes.reshape(-1, k // 8, 4), jnp.int32)


def x_interleaved(x: Float[Array, "M K"]) -> Float[Array, "M K"]:
    """x in the order of the codes: entry 8 w + p is the element that code p of word w multiplies."""
    m, k = x.shape
    return x.reshape(m, k // 64, 2, 8, 4).transpose(0, 1, 3, 2, 4).reshape(m, k)


class VectorTiles(NamedTuple):
    """One program: `rows` rows of W, `blocks` blocks of 64 of each a step; `split_low`: see `fixed_point`."""

    rows: int
    blocks: int
    warps: int
    split_low: bool


def vector_tiles(m: int, n: int, k: int) -> VectorTiles:
    """A thread holds 16 bytes of codes of each row a step: 16 blocks a warp. x's rows and W's share the registers.

    At one row, a warp a program where rows are short, and four where they are long (benchmarks/few_row_matmul.jsonl).
    """
    most = 32 if m > 1 else 16 if k <= 8192 else 64
    blocks = min(most, max(4, next_power_of_two(k // 64)))
    return VectorTiles(rows=4, blocks=blocks, warps=max(1, blocks // 16), split_low=m == 1)


class DotTiles(NamedTuple):
    """One program: a [rows, 64 blocks] tile of W a step against all M rows of x, over one of `splits` parts of K."""

    rows: int
    blocks: int
    padded_m: int
    splits: int
    steps: int
    warps: int


def dot_tiles(m: int, n: int, k: int) -> DotTiles:
    """Splits K where N alone gives too few programs to fill a GPU; their float32 sums are added afterwards."""
    rows, blocks = 64, 2
    padded_m = max(16, next_power_of_two(m))
    wanted = (384 if padded_m == 64 else 768) // -(-n // rows)  # 768: about six for each multiprocessor of an H200
    chunks = -(-k // (64 * blocks))
    splits = max(1, min(8, next_power_of_two(wanted), chunks))
    return DotTiles(rows, blocks, padded_m, splits, steps=-(-chunks // splits), warps=4)


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
