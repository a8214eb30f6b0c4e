"""Causal flash attention in Pallas: packed rows, windows, softcap and sinks on Ampere, Ada and Hopper.

What cuDNN's kernels lack. One forward kernel and two backward ones, driven by a range of keys a query (`ranges.py`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels.attention.backward import backward_kv, backward_q
from fastft_jax.pallas_kernels.attention.flash import Keep, flash, plain
from fastft_jax.pallas_kernels.attention.forward import forward as forward_kernel
from fastft_jax.pallas_kernels.attention.ranges import visible_ranges
from fastft_jax.pallas_kernels.attention.tiles import Blocks, Plan

NO_SINK = -1e30
"""A sink's logit that adds nothing to any denominator, but keeps that of a query without keys from being 0."""


class Kernels(NamedTuple):
    """The tiles of the three kernels."""

    forward: Blocks
    backward_q: Blocks
    backward_kv: Blocks


HOPPER = {
    64: Kernels(Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
    128: Kernels(Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2)),
    256: Kernels(Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 3), Blocks(64, 32, 4, 2)),
}
"""By the widest head, up to 192 KB: 1.8 to 3 times as fast there as the others (benchmarks/attention_tiles.jsonl). The
last one of 256 spills 248 bytes a thread, and is 11% faster than the next."""


def choose_kernels(
    width: int, dtype: jax.typing.DTypeLike, compute_capability: tuple[int, int] | None = None
) -> Kernels:
    """Tiles for a head of `width`: compiled for H200, A100 and L4 without spills in 16 bits, within an L4's 99 KB.

    On Hopper larger ones, of four warps for each 64 rows of a product, as its matrix units want them.
    """
    if jnp.dtype(dtype).itemsize == 4:  # no tensor cores: operands are held in registers
        return Kernels(Blocks(16, 32, 8, 1), Blocks(16, 32, 8, 1), Blocks(16, 16, 8, 1))
    if compute_capability == (9, 0):
        return next(HOPPER[most] for most in HOPPER if width <= most)
    if width <= 64:
        return Kernels(Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 2), Blocks(32, 64, 8, 2))
    if width <= 128:
        return Kernels(Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(32, 64, 8, 2))
    return Kernels(Blocks(64, 32, 8, 2), Blocks(64, 16, 8, 2), Blocks(32, 32, 8, 2))


def unsupported(*, q_shape, kv_shape, q_offset) -> tuple[str, ...]:
    """What the kernels cannot do about this problem on any device (empty: nothing stands in the way)."""
    width = q_shape[3]
    reasons = []
    if width % 8 or width > 256:
        reasons.append(f"the triton kernels take a head_dim that is a multiple of 8 up to 256, not {width}")
    if not isinstance(q_offset, int) or q_offset != 0 or q_shape[1] != kv_shape[1]:
        reasons.append("queries of a row in part (a key/value cache) are not for the triton kernels")
    return tuple(reasons)


def unsupported_device(dtype, platform, compute_capability) -> tuple[str, ...]:
    """What speaks against the kernels on this device, or against this dtype on any."""
    if platform != "gpu" or compute_capability is None:
        return ("the triton kernels need an NVIDIA GPU",)
    if compute_capability < (8, 0):
        card = ".".join(map(str, compute_capability))
        return (f"the triton kernels need compute capability 8.0, this card has {card}",)
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return (f"exact {jnp.dtype(dtype).name} products have no tensor cores: triton only by name",)
    return ()


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    kernels: Kernels | None = None,
    keep: Keep = plain,
    interpret: bool | None = None,
) -> Float[Array, "B T N H"]:
    """See `fastft_jax.pallas_kernels.attention.attention`; the problem must have passed `unsupported`.

    The tokens of one segment id stand together in their row, in any order of ids; NaN where they do not. bfloat16 and
    float16 products accumulate in float32, float32 products are exact. `kernels`: other tiles than those for any card.
    Raises ValueError for a scale or softcap that is not positive: the softmax's maximum is taken before scaling.
    """
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"the triton kernels need a positive scale and softcap, got {scale} and {softcap}")
    batch, length, heads, width = q.shape
    plan = Plan(length, heads, k.shape[2], width, float(scale), None if softcap is None else float(softcap))
    ranges = visible_ranges(segment_ids, batch, length, window)
    sinks = jnp.full((heads,), NO_SINK, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    q, k, v = (x.reshape(batch, length, -1) for x in (q, k, v))
    static = dict(plan=plan, kernels=kernels or choose_kernels(width, q.dtype), interpret=interpret)
    forward, backward = functools.partial(_forward, **static), functools.partial(_backward, **static)
    out = flash(forward, backward, (q, k, v, sinks, *ranges), keep)
    return out.reshape(batch, length, heads, width)


def _forward(q, k, v, sinks, key_start, query_end, *, plan, kernels, interpret):
    return forward_kernel(q, k, v, key_start, sinks, plan=plan, blocks=kernels.forward, interpret=interpret)


def _backward(q, k, v, sinks, key_start, query_end, out, lse, d_out, *, plan, kernels, interpret):
    delta = row_delta(out, d_out, plan)
    operands = q, k, v, d_out, lse, delta
    dq = backward_q(*operands, key_start, plan=plan, blocks=kernels.backward_q, interpret=interpret)
    dk, dv = backward_kv(*operands, query_end, plan=plan, blocks=kernels.backward_kv, interpret=interpret)
    # The sink's own probability, exp(sink - lse), times what its logit would gain: 0 - delta.
    d_sinks = -jnp.sum(jnp.exp(sinks[None, :, None] - lse) * delta, axis=(0, 2))
    return dq, dk, dv, d_sinks, None, None


def row_delta(out: Float[Array, "B T N*H"], d_out: Float[Array, "B T N*H"], plan: Plan) -> Float[Array, "B N T"]:
    """sum over H of out * d_out, fp32: what the softmax's own derivative subtracts."""
    products = out.astype(jnp.float32) * d_out.astype(jnp.float32)
    return jnp.swapaxes(products.reshape(*out.shape[:2], plan.heads, plan.width).sum(-1), 1, 2)
