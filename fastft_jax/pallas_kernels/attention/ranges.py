"""What a token of a row sees, as a range: causality, a window and packed documents in two integers a token.

Documents of packed rows are contiguous, so query t sees the keys s with `key_start[t] <= s <= t`, and key s is seen by
the queries t with `s <= t < query_end[s]`. Whole blocks outside a tile's ranges are skipped, whole blocks inside need
no mask.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

BROKEN = -1
"""`key_start` where a document does not stand together: the kernel writes NaN, which nobody overlooks."""


def visible_ranges(
    segment_ids: Int[Array, "B T"] | None, batch: int, length: int, window: int | None
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """(key_start, query_end), int32; segment id 0 sees nothing (key_start = T) and is seen by nothing (query_end = 0).

    Ids may come in any order, but the tokens of one id must stand together in their row: `BROKEN` from where they do
    not. window: Hugging Face's, W keys with the query's own among them.
    """
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    start, end = jnp.zeros_like(index), jnp.full_like(index, length)
    if segment_ids is not None:
        edge = jnp.ones((batch, 1), bool)
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        first, last = jnp.concatenate([edge, changes], axis=1), jnp.concatenate([changes, edge], axis=1)
        start = lax.cummax(jnp.where(first, index, 0), axis=1)
        end = lax.cummin(jnp.where(last, index + 1, length), axis=1, reverse=True)
        # T * T comparisons, a ten-thousandth of attention's own work, reduced as they are made.
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        broken = jnp.any(same & (index[:, None, :] < start[:, :, None]), axis=2)
    if window is not None:
        start, end = jnp.maximum(start, index - window + 1), jnp.minimum(end, index + window)
    if segment_ids is not None:
        start = jnp.where(segment_ids == 0, length, jnp.where(broken, BROKEN, start))
        end = jnp.where(segment_ids == 0, 0, end)
    return start, end
