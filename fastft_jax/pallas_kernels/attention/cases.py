"""What the attention kernels are compiled and timed on: rows of real models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fastft_jax.pallas_kernels.attention import reference, triton
from fastft_jax.pallas_kernels.case import Case

FORWARD_FLOPS, TRAIN_FLOPS = 4, 14  # a visible pair and column of q; the backward pass repeats q k^T


def _attend(implementation, options, packed, sinks, kernels, interpret, q, k, v, *rest):
    rest = list(rest)
    ids = rest.pop(0) if packed else None
    options = dict(options, sinks=rest.pop(0) if sinks else None)
    if implementation == "xla":
        return reference.attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, **options)
    return triton.attention(q, k, v, segment_ids=ids, kernels=kernels, interpret=interpret, **options)


def _train(attend, q, k, v, d_out, *rest):
    out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, *rest), q, k, v)
    return out, *vjp(d_out)


def _segments(batch: int, length: int) -> np.ndarray:
    """Four documents of unlike lengths a row, and some padding."""
    ends = [length // 8, length // 3, length // 2, length - 7]
    return np.broadcast_to((np.searchsorted(ends, np.arange(length), side="right") + 1) % 5, (batch, length))


def _pairs(ids: np.ndarray | None, batch: int, length: int, window: int | None) -> int:
    """Visible pairs of query and key in the batch."""
    index = np.arange(length)
    position = np.broadcast_to(index, (batch, length))
    if ids is not None:
        starts = np.concatenate([np.ones((batch, 1), bool), ids[:, 1:] != ids[:, :-1]], axis=1)
        position = np.where(ids == 0, -1, index - np.maximum.accumulate(np.where(starts, index, 0), axis=1))
    return int(np.minimum(position + 1, window or length).sum())


def _cases(
    name: str,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    width: int,
    *,
    window: int | None = None,
    softcap: float | None = None,
    packed: bool = False,
    sinks: bool = False,
    hopper: bool = False,
    spills: int = 0,
) -> tuple[Case, Case]:
    options = dict(scale=width**-0.5, window=window, softcap=softcap)
    q, k = (jax.ShapeDtypeStruct((batch, length, n, width), jnp.bfloat16) for n in (heads, kv_heads))
    rest = (jax.ShapeDtypeStruct((batch, length), jnp.int32),) if packed else ()
    rest += (jax.ShapeDtypeStruct((heads,), jnp.float32),) if sinks else ()
    ids = _segments(batch, length) if packed else None
    kernels = triton.HOPPER[width] if hopper else None
    attend = functools.partial(_attend, "triton", options, packed, sinks, kernels)
    exact = functools.partial(_attend, "xla", options, packed, sinks, None, None)

    def draw(args, seed):
        keys = jax.random.split(jax.random.key(seed), len(args))
        return tuple(
            jnp.asarray(ids, jnp.int32) if a.dtype == jnp.int32 else jax.random.normal(key, a.shape, a.dtype)
            for key, a in zip(keys, args, strict=True)
        )

    work = _pairs(ids, batch, length, window) * heads * width
    lse = batch * heads * length * 4
    least = dict(min_compute_capability=(9, 0), spills=spills) if hopper else {}
    size = f"{name}/{batch}x{length}x{heads}x{kv_heads}x{width}"
    forward, train = (q, k, k, *rest), (q, k, k, q, *rest)
    return (
        Case(
            name=f"attention/forward/{size}",
            run=lambda *args, interpret=None: attend(interpret, *args),
            reference=exact,
            args=forward,
            bytes=2 * (2 * q.size + 2 * k.size) + lse,
            flops=FORWARD_FLOPS * work,
            draw=functools.partial(draw, forward),
            **least,
        ),
        Case(
            name=f"attention/train/{size}",
            run=lambda *args, interpret=None: _train(functools.partial(attend, interpret), *args),
            reference=functools.partial(_train, exact),
            args=train,
            bytes=2 * (5 * q.size + 6 * k.size) + 2 * lse,
            flops=TRAIN_FLOPS * work,
            draw=functools.partial(draw, train),
            **least,
        ),
    )


# Without `hopper` as every other card compiles them, also where a Hopper card times them
CASES: tuple[Case, ...] = (
    *_cases("llama_hopper", 2, 4096, 32, 8, 128, hopper=True),
    *_cases("gemma2_hopper", 2, 4096, 16, 8, 256, softcap=50.0, hopper=True, spills=256),
    *_cases("gpt_oss_hopper", 2, 4096, 64, 8, 64, sinks=True, hopper=True),
    *_cases("llama", 2, 4096, 32, 8, 128),
    *_cases("llama_packed", 2, 4096, 32, 8, 128, packed=True),
    *_cases("gemma2_local", 2, 4096, 16, 8, 256, window=2048, softcap=50.0, packed=True),
    *_cases("gpt_oss_local", 2, 4096, 64, 8, 64, window=128, sinks=True),
    *_cases("odd", 1, 1000, 28, 4, 80, window=300, softcap=30.0, packed=True, sinks=True),
)
