"""Causal grouped-query attention over packed or plain rows."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.attention import cudnn, reference, triton
from fastft_jax.pallas_kernels.attention.flash import Keep, plain
from fastft_jax.pallas_kernels.pallas import current_device

__all__ = ["Selection", "attention", "select_implementation"]

Implementation = Literal["xla", "cudnn", "triton"]


class Selection(NamedTuple):
    """Which implementation runs, and why each faster one does not (empty when the fastest runs)."""

    name: Implementation
    reasons: tuple[str, ...]


def select_implementation(
    *,
    q_shape: tuple[int, int, int, int],
    kv_shape: tuple[int, int, int, int],
    dtype,
    softcap: float | None = None,
    packed: bool = False,
    max_segments: int | None = None,
    q_offset: int | Array = 0,
    sinks: bool = False,
    platform: str,
    compute_capability: tuple[int, int] | None,
) -> Selection:
    """The implementation `attention` takes by itself for these shapes on such a device; a pure function.

    cuDNN where it applies, then triton, then xla. `packed`: segment ids are given; `sinks`: sinks are. `platform` is
    "gpu" or another JAX backend's name; `compute_capability` is None for anything but an NVIDIA GPU.
    `pallas.current_device()` says both for the device at hand.
    """
    against_cudnn = cudnn.unsupported(
        q_shape=q_shape,
        kv_shape=kv_shape,
        dtype=dtype,
        softcap=softcap,
        packed=packed,
        max_segments=max_segments,
        q_offset=q_offset,
        sinks=sinks,
    )
    against_cudnn += cudnn.unsupported_device(q_shape, packed, max_segments, platform, compute_capability)
    if not against_cudnn:
        return Selection("cudnn", ())
    against_triton = triton.unsupported(q_shape=q_shape, kv_shape=kv_shape, q_offset=q_offset)
    against_triton += triton.unsupported_device(dtype, platform, compute_capability)
    if not against_triton:
        return Selection("triton", against_cudnn)
    return Selection("xla", against_cudnn + against_triton)


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
    max_segments: int | None = None,
    max_document_length: int | None = None,
    sinks: Float[Array, "N"] | None = None,
    keep: Keep = plain,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """`o[t] = sum_s softmax_s(scale * q[t] . k[s]) v[s]` over the keys s that query t sees; result in q's dtype.

    With i = t + q_offset (q_offset: the queries' index in the row when k and v are a cache), key s is seen if and only
    if s <= i, and `window` is None or i - s < window (Hugging Face's `sliding_window`), and both segment ids are equal
    and not 0. A query that sees nothing gives zeros and takes part in no gradient. `softcap` replaces the logits x by
    softcap * tanh(x / softcap). Query head n reads key head n // (N / K). Softmax is fp32.

    `sinks` (one learned logit a head, neither scaled nor capped) join the softmax's denominator only, as in GPT-OSS.

    "triton" and "cudnn" want the tokens of one segment id to stand together in their row, the same ids for q and k;
    triton's output is NaN where they do not stand together. `max_segments` (static) promises more: ids 1..M, M <=
    max_segments, in ascending order from the start of the row, then 0 for padding; cuDNN needs that promise.
    `max_document_length` (static) promises that no document is longer, which makes cuDNN's backward pass smaller. Where
    more or longer documents than promised come, cuDNN's output is NaN.

    `implementation`: None takes the fastest that fits (`select_implementation`); "cudnn" by name is obeyed whatever
    the device, so that a program can be compiled for a GPU that is not there; "triton" by name is interpreted, slowly,
    where there is no GPU. The residuals go through keep("attn_out", ..) and (but for xla) keep("attn_lse", ..), which
    may return copies kept earlier: the forward kernel is then not repeated in a backward pass.

    Raises ValueError for shapes that do not fit each other, one of the two segment ids without the other, or an
    implementation asked for by name that cannot do it (the message says why).
    Sources: Dao 2023 (arXiv:2307.08691); grouped queries: Ainslie et al. 2023 (arXiv:2305.13245); sinks: Xiao et al.
    2023 (arXiv:2309.17453).
    """
    _check(q, k, v, window, q_segment_ids, kv_segment_ids, max_segments, max_document_length, sinks, implementation)
    shapes = dict(q_shape=q.shape, kv_shape=k.shape, q_offset=q_offset)
    features = dict(
        dtype=q.dtype,
        softcap=softcap,
        packed=q_segment_ids is not None,
        max_segments=max_segments,
        sinks=sinks is not None,
    )
    if implementation is None and pallas.only_references():
        chosen = "xla"
    elif implementation is None:
        platform, capability = current_device()
        chosen = select_implementation(**shapes, **features, platform=platform, compute_capability=capability).name
    else:
        chosen, reasons = implementation, ()
        if chosen == "cudnn":
            reasons = cudnn.unsupported(**shapes, **features)
        elif chosen == "triton":
            reasons = triton.unsupported(**shapes)
        if reasons:
            raise ValueError(f'attention(implementation="{chosen}"): {"; ".join(reasons)}')
    if chosen == "cudnn":
        return cudnn.attention(
            q,
            k,
            v,
            scale=scale,
            window=window,
            segment_ids=q_segment_ids,
            max_segments=max_segments,
            max_document_length=max_document_length,
            keep=keep,
        )
    if chosen == "triton":
        options = dict(scale=scale, window=window, softcap=softcap, segment_ids=q_segment_ids, sinks=sinks, keep=keep)
        kernels = triton.choose_kernels(q.shape[3], q.dtype, current_device()[1])
        return triton.attention(q, k, v, kernels=kernels, **options)
    out = reference.attention(
        q,
        k,
        v,
        scale=scale,
        window=window,
        softcap=softcap,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_offset=q_offset,
        sinks=sinks,
    )
    return keep("attn_out", out)


def _check(
    q, k, v, window, q_segment_ids, kv_segment_ids, max_segments, max_document_length, sinks, implementation
) -> None:
    if implementation not in (None, "xla", "cudnn", "triton"):
        raise ValueError(f'implementation must be None, "xla", "cudnn" or "triton", got {implementation!r}')
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q [B, T, N, H], k and v [B, S, K, H] do not fit: {q.shape}, {k.shape}, {v.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks must be one a query head, [{q.shape[2]}], got {sinks.shape}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids must be given together")
    for name, value in (("max_segments", max_segments), ("max_document_length", max_document_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, ids, like in (("q", q_segment_ids, q), ("kv", kv_segment_ids, k)):
        if ids is not None and (ids.shape != like.shape[:2] or not jnp.issubdtype(ids.dtype, jnp.integer)):
            raise ValueError(f"{name}_segment_ids must be integers {like.shape[:2]}, got {ids.dtype} {ids.shape}")
