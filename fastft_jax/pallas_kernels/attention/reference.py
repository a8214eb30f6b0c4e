"""Causal grouped-query attention in plain jnp: the whole truth the other implementations are compared with.

`o[t] = sum_s softmax_s(cap(scale * q[t] . k[s])) v[s]` over the keys that query t may see; logits and softmax in fp32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Rows longer than this are computed a block of queries at a time: [B, N, T, S] in fp32 is 32 GiB for one row of
# 16384 tokens with 32 heads.
LONG_ROW = 2048
# Logits held at once in the blocked form: 2**28 fp32 numbers are 1 GiB.
BLOCK_LOGITS = 1 << 28
# Finite, so that a row without any visible key has a finite maximum and finite gradients.
MASKED = -1e30


def _visible(q_index, kv_index, q_segments, kv_segments, window):
    """Bool [B or 1, T, S]: key s is not after query t, is within its window, and is in the same (non-zero) segment."""
    distance = q_index[:, :, None] - kv_index[None, None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if q_segments is not None:
        mask &= (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments != 0)[:, :, None]
    return mask


def _attend(q, q_index, q_segments, k, v, kv_segments, sinks, *, scale, window, softcap):
    """Attention of q [B, T, K, N/K, H] to all of k, v [B, S, K, H]; [B, T, K, N/K, H] in q's dtype."""
    # fp32 inputs are a request for exact arithmetic; without this a GPU multiplies them in TF32.
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    mask = _visible(q_index, jnp.arange(k.shape[1], dtype=jnp.int32), q_segments, kv_segments, window)[:, None, None]
    logits = jnp.where(mask, logits, MASKED)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(1, *q.shape[2:4], 1, 1)  # [1, K, N/K, 1, 1]
        peak = jnp.maximum(peak, sinks)
    peak = lax.stop_gradient(peak)
    weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - peak)
    # A query that sees nothing has total 0: dividing by 1 instead gives a zero output and zero gradients.
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    out = jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32
    )
    return out.astype(q.dtype)


def _query_block(batch: int, heads: int, keys: int) -> int:
    """Queries a block: the power of two (16..1024) whose fp32 logits stay within `BLOCK_LOGITS`."""
    return 1 << int(math.log2(min(1024, max(16, BLOCK_LOGITS // (batch * heads * keys)))))


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N H"]:
    """See `fastft_jax.pallas_kernels.attention.attention`; every argument combination is supported here.

    Query heads are grouped by their key head ([B, T, K, N/K, H]), so k and v are never repeated. For T > `LONG_ROW` the
    queries go through `lax.map` in blocks, each recomputed in the backward pass, so memory grows with S and not T * S.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    q_index = jnp.arange(length, dtype=jnp.int32)[None, :] + jnp.reshape(jnp.asarray(q_offset, jnp.int32), (-1, 1))
    attend = functools.partial(_attend, scale=scale, window=window, softcap=softcap)
    if length <= LONG_ROW:
        out = attend(grouped, q_index, q_segment_ids, k, v, kv_segment_ids, sinks)
        return out.reshape(batch, length, heads, width)

    block = _query_block(batch, heads, k.shape[1])
    blocks = -(-length // block)

    def split(x):  # [b, T, ...] -> [blocks, b, block, ...], the tail padded with zeros that are cut off again below
        x = jnp.pad(x, [(0, 0), (0, blocks * block - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, block, *x.shape[2:]), 1, 0)

    queries = (split(grouped), split(q_index), None if q_segment_ids is None else split(q_segment_ids))
    step = jax.checkpoint(lambda xs: attend(*xs, k, v, kv_segment_ids, sinks), prevent_cse=False)
    out = jnp.moveaxis(lax.map(step, queries), 0, 1)
    return out.reshape(batch, blocks * block, heads, width)[:, :length]
