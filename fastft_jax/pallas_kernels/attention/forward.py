"""The forward kernel: a program is a tile of queries of one head, which walks the keys that the tile sees.

Source: Dao 2023 (arXiv:2307.08691). Softmax is kept in base 2 with a running maximum m; l is its running denominator.
It starts from m = sink, l = 1: the sink is one more key, whose value is zero.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.attention.ranges import BROKEN
from fastft_jax.pallas_kernels.attention.tiles import (
    LOG2E,
    Blocks,
    Plan,
    dot,
    head_token_spec,
    key_blocks,
    load_bounds,
    load_tile,
    logits,
    loop,
    row_spec,
    store_tile,
    token_spec,
)


def _kernel(q_ref, k_ref, v_ref, start_ref, sink_ref, out_ref, lse_ref, *, plan: Plan, blocks: Blocks) -> None:
    rows, keys = blocks.queries, blocks.keys
    head = pallas.program_id(0)
    kv_head = lax.div(head, plan.group)
    row = (pallas.cdiv(plan.length, rows) - 1 - pallas.program_id(1)) * rows  # the tiles with most keys start first
    query = row + jnp.arange(rows)
    start = load_bounds(start_ref, plan, row, rows)
    q = load_tile(q_ref, plan, row, rows, head)

    def body(block, masked, carry):
        peak, total, out = carry
        first = block * keys
        x = logits(q, load_tile(k_ref, plan, first, keys, kv_head, ragged=masked), plan)
        if masked:
            key = (first + jnp.arange(keys))[None, :]
            x = jnp.where((key <= query[:, None]) & (key >= start[:, None]), x, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(x, axis=1) * plan.exponent)
        weights = jnp.exp2(x * plan.exponent - new_peak[:, None])
        decay = jnp.exp2(peak - new_peak)
        v = load_tile(v_ref, plan, first, keys, kv_head, ragged=masked)
        out = out * decay[:, None] + dot(weights.astype(v.dtype), v)
        return new_peak, total * decay + jnp.sum(weights, axis=1), out

    sink = jnp.broadcast_to(sink_ref[head] * LOG2E, (rows,))
    carry = sink, jnp.ones((rows,), jnp.float32), jnp.zeros((rows, plan.lanes), jnp.float32)
    peak, total, out = loop(*key_blocks(start, row, plan, blocks), body, carry)
    out = jnp.where((start == BROKEN)[:, None], jnp.nan, out / total[:, None])
    store_tile(out_ref, plan, row, rows, head, out)
    lse = (peak + jnp.log2(total)) / LOG2E
    pallas.store(lse_ref.at[pallas.ds(row, rows)], lse, mask=query < plan.length)


def forward(
    q: Float[Array, "B T N*H"],
    k: Float[Array, "B T K*H"],
    v: Float[Array, "B T K*H"],
    key_start: Int[Array, "B T"],
    sinks: Float[Array, "N"],
    *,
    plan: Plan,
    blocks: Blocks,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T N*H"], Float[Array, "B N T"]]:
    """(out, fp32 log-sum-exp with the sink in it); zeros and the sink alone for a query that sees nothing."""
    batch, tiles = q.shape[0], pallas.cdiv(plan.length, blocks.queries)
    return pallas.call(
        functools.partial(_kernel, plan=plan, blocks=blocks),
        name="attention_forward",
        grid=(plan.heads, tiles, batch),
        in_specs=[
            row_spec(plan, plan.heads),
            row_spec(plan, plan.kv_heads),
            row_spec(plan, plan.kv_heads),
            token_spec(plan),
            pallas.BlockSpec((plan.heads,), lambda n, i, b: (0,)),
        ],
        out_specs=[row_spec(plan, plan.heads), head_token_spec(plan)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, plan.heads, plan.length), jnp.float32),
        ],
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        interpret=interpret,
    )(q, k, v, key_start, sinks)
