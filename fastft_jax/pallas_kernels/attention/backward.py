"""The backward kernels: one for dq, a program a tile of queries, and one for dk and dv, a program a tile of keys.

With p = exp(logit - lse), delta = rowsum(out * d_out) and ds = p * (d_out @ v^T - delta) * d logit / d(scale q k^T):
dv = p^T d_out, dk = scale * ds^T q, dq = scale * ds k. Source: Dao 2023 (arXiv:2307.08691).

Two kernels and no atomics: results are the same to the bit from run to run, and no fp32 copy of dq is needed. Under
grouped queries a program of dk and dv goes over its group's query heads in turn, for the same reasons: an fp32 copy of
dk and dv for every query head would be 4 * N / K times their size. There are programs enough: K * T / keys a row.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.attention.tiles import (
    LOG2E,
    Blocks,
    Plan,
    dot,
    head_token_spec,
    key_blocks,
    load_bounds,
    load_rows,
    load_tile,
    logits,
    loop,
    query_blocks,
    row_spec,
    store_tile,
    token_spec,
)


def _dq_kernel(
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, start_ref, dq_ref, *, plan: Plan, blocks: Blocks
) -> None:
    rows, keys = blocks.queries, blocks.keys
    head = pallas.program_id(0)
    kv_head = lax.div(head, plan.group)
    row = (pallas.cdiv(plan.length, rows) - 1 - pallas.program_id(1)) * rows
    query = (row + jnp.arange(rows))[:, None]
    start = load_bounds(start_ref, plan, row, rows)
    q = load_tile(q_ref, plan, row, rows, head)
    d_out = load_tile(d_out_ref, plan, row, rows, head)
    lse = load_rows(lse_ref, plan, row, rows)[:, None] * LOG2E
    delta = load_rows(delta_ref, plan, row, rows)[:, None]

    def body(block, masked, dq):
        first = block * keys
        k = load_tile(k_ref, plan, first, keys, kv_head, ragged=masked)
        v = load_tile(v_ref, plan, first, keys, kv_head, ragged=masked)
        x = logits(q, k, plan)
        p = jnp.exp2(x * plan.exponent - lse)
        if masked:
            key = (first + jnp.arange(keys))[None, :]
            p = jnp.where((key <= query) & (key >= start[:, None]), p, 0.0)
        return dq + dot(_d_logits(p, dot(d_out, v.T), delta, x, plan).astype(k.dtype), k)

    dq = loop(*key_blocks(start, row, plan, blocks), body, jnp.zeros((rows, plan.lanes), jnp.float32))
    store_tile(dq_ref, plan, row, rows, head, dq * plan.scale)


def _dkv_kernel(
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, end_ref, dk_ref, dv_ref, *, plan: Plan, blocks: Blocks
) -> None:
    rows, keys = blocks.queries, blocks.keys
    kv_head = pallas.program_id(0)
    row = pallas.program_id(1) * keys  # the first tiles are seen by most queries
    key = (row + jnp.arange(keys))[:, None]
    end = load_bounds(end_ref, plan, row, keys)
    k = load_tile(k_ref, plan, row, keys, kv_head)
    v = load_tile(v_ref, plan, row, keys, kv_head)
    bounds = query_blocks(end, row, plan, blocks)

    def of_head(member, carry):
        head = kv_head * plan.group + member

        def body(block, masked, carry):
            dk, dv = carry
            first = block * rows
            q = load_tile(q_ref, plan, first, rows, head, ragged=masked)
            d_out = load_tile(d_out_ref, plan, first, rows, head, ragged=masked)
            lse = load_rows(lse_ref, plan, first, rows, member)[None, :] * LOG2E
            delta = load_rows(delta_ref, plan, first, rows, member)[None, :]
            x = logits(k, q, plan)
            p = jnp.exp2(x * plan.exponent - lse)
            if masked:
                query = (first + jnp.arange(rows))[None, :]
                p = jnp.where((query >= key) & (query < end[:, None]), p, 0.0)
            dv = dv + dot(p.astype(d_out.dtype), d_out)
            return dk + dot(_d_logits(p, dot(v, d_out.T), delta, x, plan).astype(q.dtype), q), dv

        return loop(*bounds, body, carry)

    zeros = jnp.zeros((keys, plan.lanes), jnp.float32)
    dk, dv = lax.fori_loop(0, plan.group, of_head, (zeros, zeros))
    store_tile(dk_ref, plan, row, keys, kv_head, dk * plan.scale)
    store_tile(dv_ref, plan, row, keys, kv_head, dv)


def _d_logits(p, dp, delta, x, plan: Plan) -> jax.Array:
    ds = p * (dp - delta)
    return ds if plan.softcap is None else ds * (1.0 - x * x)


def backward_q(
    q: Float[Array, "B T N*H"],
    k: Float[Array, "B T K*H"],
    v: Float[Array, "B T K*H"],
    d_out: Float[Array, "B T N*H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    key_start: Int[Array, "B T"],
    *,
    plan: Plan,
    blocks: Blocks,
    interpret: bool | None = None,
) -> Float[Array, "B T N*H"]:
    """dq in q's dtype."""
    of_q, of_k = row_spec(plan, plan.heads), row_spec(plan, plan.kv_heads)
    return pallas.call(
        functools.partial(_dq_kernel, plan=plan, blocks=blocks),
        name="attention_backward_q",
        grid=(plan.heads, pallas.cdiv(plan.length, blocks.queries), q.shape[0]),
        in_specs=[of_q, of_k, of_k, of_q, head_token_spec(plan), head_token_spec(plan), token_spec(plan)],
        out_specs=of_q,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        interpret=interpret,
    )(q, k, v, d_out, lse, delta, key_start)


def backward_kv(
    q: Float[Array, "B T N*H"],
    k: Float[Array, "B T K*H"],
    v: Float[Array, "B T K*H"],
    d_out: Float[Array, "B T N*H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    query_end: Int[Array, "B T"],
    *,
    plan: Plan,
    blocks: Blocks,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T K*H"], Float[Array, "B T K*H"]]:
    """(dk, dv) in k's dtype, summed over the group's query heads in fp32."""
    of_q, of_k = row_spec(plan, plan.heads), row_spec(plan, plan.kv_heads)
    lse, delta = (x.reshape(x.shape[0], plan.kv_heads, plan.group * plan.length) for x in (lse, delta))
    of_group = pallas.BlockSpec((None, None, plan.group * plan.length), lambda n, i, b: (b, n, 0))
    return pallas.call(
        functools.partial(_dkv_kernel, plan=plan, blocks=blocks),
        name="attention_backward_kv",
        grid=(plan.kv_heads, pallas.cdiv(plan.length, blocks.keys), q.shape[0]),
        in_specs=[of_q, of_k, of_k, of_q, of_group, of_group, token_spec(plan)],
        out_specs=[of_k, of_k],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        interpret=interpret,
    )(q, k, v, d_out, lse, delta, query_end)
