"""What the attention kernels share: block sizes, loads of tiles, logits.

q, k, v are seen as [B, T, heads * H]: a head is a slice of columns, so that a tile is one two-dimensional load, as
Triton's software pipeline wants it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fastft_jax.pallas_kernels import pallas

LOG2E = 1.4426950408889634


class Blocks(NamedTuple):
    """A kernel's tile: queries by keys, and how Triton compiles it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """Static facts of one attention: what all its kernels are compiled for."""

    length: int  # T
    heads: int  # N
    kv_heads: int  # K
    width: int  # H
    scale: float
    softcap: float | None

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def lanes(self) -> int:
        """H rounded up to what a value may have as a dimension, and a tensor core as its depth."""
        return max(16, 1 << (self.width - 1).bit_length())

    @property
    def exponent(self) -> float:
        """exp(logit) = exp2(exponent * x), x from `logits`."""
        return LOG2E * (self.scale if self.softcap is None else self.softcap)


def load_tile(ref, plan: Plan, row, rows: int, head, *, ragged: bool = True) -> jax.Array:
    """Rows row.. of a head, [rows, lanes]; zeros beyond H, and beyond T if rows there are (`ragged`)."""
    mask = _tile_mask(plan, row, rows, ragged)
    at = ref.at[pallas.ds(row, rows), pallas.ds(head * plan.width, plan.lanes)]
    return pallas.load(at) if mask is None else pallas.load(at, mask=mask, other=0)


def store_tile(ref, plan: Plan, row, rows: int, head, value: jax.Array) -> None:
    at = ref.at[pallas.ds(row, rows), pallas.ds(head * plan.width, plan.lanes)]
    pallas.store(at, value.astype(ref.dtype), mask=_tile_mask(plan, row, rows, True))


def _tile_mask(plan: Plan, row, rows: int, ragged: bool) -> jax.Array | None:
    """Bool [rows, lanes] of what exists; None where the shapes say that all of it does."""
    mask = None
    if ragged and plan.length % rows:
        mask = jnp.broadcast_to((row + jnp.arange(rows) < plan.length)[:, None], (rows, plan.lanes))
    if plan.lanes != plan.width:
        columns = jnp.broadcast_to((jnp.arange(plan.lanes) < plan.width)[None, :], (rows, plan.lanes))
        mask = columns if mask is None else mask & columns
    return mask


def load_rows(ref, plan: Plan, row, rows: int, head=0) -> jax.Array:
    """[rows] of a float a token, from a head's place in rows [heads * T]; zeros beyond T."""
    at = ref.at[pallas.ds(head * plan.length + row, rows)]
    return pallas.load(at, mask=row + jnp.arange(rows) < plan.length, other=0)


def load_bounds(ref, plan: Plan, row, rows: int) -> jax.Array:
    """[rows] of a range's ends; rows beyond T repeat the last one, so that a tile's least and greatest are its own."""
    return ref[jnp.minimum(row + jnp.arange(rows), plan.length - 1)]


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in fp32; exact products for fp32 operands (a GPU's own choice would be TF32)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def logits(a: jax.Array, b: jax.Array, plan: Plan) -> jax.Array:
    """x = a @ b^T, of which the logit is scale * x; with a softcap x = tanh(scale / cap * a @ b^T), the logit cap * x.

    tanh(y) = 1 - 2 / (1 + exp(2 y)): one fast exponential; the library's tanh branches.
    """
    x = dot(a, b.T)
    if plan.softcap is None:
        return x
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2.0 * LOG2E * plan.scale / plan.softcap)))


def key_blocks(start: jax.Array, row, plan: Plan, blocks: Blocks):
    """Bounds for `loop` of the key blocks that the tile of queries at `row` sees, by its queries' `key_start`."""
    upper = pallas.cdiv(jnp.minimum(row + blocks.queries, plan.length), blocks.keys)
    lower = jnp.minimum(lax.div(jnp.maximum(jnp.min(start), 0), blocks.keys), upper)
    full_lower = jnp.minimum(pallas.cdiv(jnp.max(start), blocks.keys), upper)
    return lower, full_lower, jnp.clip(lax.div(row + 1, blocks.keys), full_lower, upper), upper


def query_blocks(end: jax.Array, row, plan: Plan, blocks: Blocks):
    """Bounds for `loop` of the query blocks that see the tile of keys at `row`, by its keys' `query_end`."""
    lower = lax.div(row, blocks.queries)
    upper = jnp.maximum(pallas.cdiv(jnp.max(end), blocks.queries), lower)
    full_lower = jnp.clip(pallas.cdiv(row + blocks.keys - 1, blocks.queries), lower, upper)
    return lower, full_lower, jnp.clip(lax.div(jnp.min(end), blocks.queries), full_lower, upper), upper


def row_spec(plan: Plan, heads: int) -> pallas.BlockSpec:
    """Whole rows of [B, T, heads * H], one b a program; the grid is (head, tile, b)."""
    return pallas.BlockSpec((None, plan.length, heads * plan.width), lambda n, i, b: (b, 0, 0))


def token_spec(plan: Plan) -> pallas.BlockSpec:
    """Of int32 [B, T]."""
    return pallas.BlockSpec((None, plan.length), lambda n, i, b: (b, 0))


def head_token_spec(plan: Plan) -> pallas.BlockSpec:
    """Of fp32 [B, N, T]: one head's row."""
    return pallas.BlockSpec((None, None, plan.length), lambda n, i, b: (b, n, 0))


def loop(lower, full_lower, full_upper, upper, body, carry):
    """`body(block, masked, carry)` over the blocks lower..upper-1: first those that need no mask, full_lower..
    full_upper-1, then what is left at either end."""
    before = full_lower - lower
    edge = lambda i, c: body(jnp.where(i < before, lower + i, full_upper + i - before), True, c)  # noqa: E731
    carry = lax.fori_loop(full_lower, full_upper, lambda i, c: body(i, False, c), carry)
    return lax.fori_loop(0, before + upper - full_upper, edge, carry)
