"""Causal attention by cuDNN's flash kernels, for plain rows and for packed ones.

`jax.nn.dot_product_attention` hides two things that training needs: the residuals, so that a remat policy can name
them (without both names the forward kernel runs twice), and packed rows. Hence the primitives underneath it are bound
here, with jax 0.11's argument order: `fwd(q, k, v, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, page_table_k,
page_table_v) -> out [B, T, N, H], lse fp32 [B, N, T]`; `bwd(the same ten, lse, out, d_out) -> dq, dk, dv`.
What is not used is an empty array of q's dtype.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo as fused
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels.attention.flash import Keep, flash, plain

_MAX_INT32 = 2**31 - 1


def unsupported(*, q_shape, kv_shape, dtype, softcap, packed, max_segments, q_offset, sinks) -> tuple[str, ...]:
    """What cuDNN cannot do about this problem on any device (empty: nothing stands in the way)."""
    batch, length, heads, width = q_shape
    reasons = []
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        reasons.append(f"cuDNN attention takes bfloat16 or float16, not {jnp.dtype(dtype).name}")
    if width % 8 or width > 256:
        reasons.append(f"head_dim {width} is not a multiple of 8 up to 256")
    if softcap is not None:
        reasons.append("cuDNN attention has no logit softcap")
    if sinks:
        reasons.append("cuDNN attention has no sinks")
    if not isinstance(q_offset, int) or q_offset != 0 or length != kv_shape[1]:
        reasons.append("queries of a row in part (a key/value cache) are not for cuDNN")
    if packed and max_segments is None:
        reasons.append("segment ids without max_segments: cuDNN needs the promise of contiguous packed rows")
    if packed and batch * length * heads * width > _MAX_INT32:
        reasons.append(f"cuDNN's int32 offsets into packed rows stop at 2**31 elements; q has {q_shape}")
    return tuple(reasons)


def unsupported_device(q_shape, packed, max_segments, platform, compute_capability) -> tuple[str, ...]:
    """What this device lacks for the problem."""
    if platform != "gpu" or compute_capability is None:
        return ("cuDNN needs an NVIDIA GPU",)
    card = ".".join(map(str, compute_capability))
    if compute_capability < (8, 0):
        return (f"cuDNN flash attention needs compute capability 8.0, this card has {card}",)
    reasons = []
    if compute_capability < (9, 0):
        if q_shape[3] > 128:
            reasons.append(f"head_dim {q_shape[3]} above 128 needs compute capability 9.0, this card has {card}")
        if packed and max_segments is not None and max_segments > 1:
            reasons.append(f"packed rows need compute capability 9.0 (Hopper), this card has {card}")
    return tuple(reasons)


class Segments(NamedTuple):
    """The documents of packed rows as cuDNN's kernels want them: one list over the whole batch, in order.

    D: places in that list. Places without a document have length 0 and start B * T.
    """

    ids: Int[Array, "B T"]  # 1..M, 0 = padding, M + 1 where a promise was broken
    lengths: Int[Array, "D"]
    starts: Int[Array, "D"]  # first token, counted over the batch: b * T + t
    place: Int[Array, "B T"]  # of the token's document in the list


def fold(length: int, max_segments: int, max_document_length: int | None) -> int:
    """Into how many rows a row of packed documents is cut for cuDNN (1: not at all), none shorter than a document.

    As XLA calls it, cuDNN's backward workspace holds fp32 dq for every document *at a row's length*, B * M * T * N * H
    * 4 bytes: 4.3 GB for 2 rows of 4096 tokens, 32 heads of 128 and 32 documents a row. But documents are addressed by
    offsets into memory alone and may lie across two rows, so [B, T] may be called [B * fold, T / fold], which divides
    the workspace by `fold` (XLA's cuda_dnn.cc sets no max_total_seq_len, which would have done it).
    """
    longest = max_document_length or length
    by = 1
    while by * 4 <= max_segments and length % (by * 2 * 64) == 0 and length // (by * 2) >= longest:
        by *= 2
    return by


def find_segments(segment_ids: Int[Array, "B T"], max_segments: int, folded: int) -> Segments:
    """The list from the ids; integer reductions over [B, M, T], computed on the device."""
    ids = segment_ids.astype(jnp.int32)
    batch, length = ids.shape
    member = ids[:, None, :] == jnp.arange(1, max_segments + 1, dtype=jnp.int32)[None, :, None]
    lengths = jnp.sum(member, axis=-1, dtype=jnp.int32)
    starts = jnp.argmax(member, axis=-1).astype(jnp.int32) + length * jnp.arange(batch, dtype=jnp.int32)[:, None]
    exists = (lengths > 0).reshape(-1)
    document = jnp.clip(ids - 1, 0, max_segments - 1)  # of a token, within its row

    places = jnp.maximum(jnp.cumsum(exists, dtype=jnp.int32) - 1, 0).reshape(lengths.shape)
    slots = batch * folded * -(-max_segments // folded)
    order = jnp.nonzero(exists, size=slots, fill_value=exists.size)[0]
    too_long = jnp.take_along_axis(lengths, document, axis=1) > length // folded
    return Segments(
        ids=jnp.where((ids > 0) & too_long, max_segments + 1, ids),
        lengths=jnp.minimum(jnp.take(lengths.reshape(-1), order, fill_value=0), length // folded),
        starts=jnp.take(starts.reshape(-1), order, fill_value=batch * length),
        place=jnp.take_along_axis(places, document, axis=1),
    )


def rows_from_segments(lse: Float[Array, "D N T/fold"], segments: Segments) -> Float[Array, "B N T"]:
    """cuDNN's log-sum-exp of packed rows (a row per document, from its first token) put where the tokens are.

    What a remat policy saves is then M times smaller.
    """
    batch, length = segments.ids.shape
    token = jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length)
    offset = jnp.clip(token - segments.starts[segments.place], 0, lse.shape[2] - 1)
    rows = jnp.where((segments.ids != 0)[:, :, None], lse[segments.place, :, offset], 0.0)  # [B, T, N]
    return jnp.swapaxes(rows, 1, 2)


def segments_from_rows(lse: Float[Array, "B N T"], segments: Segments, folded: int) -> Float[Array, "D N T/fold"]:
    """The inverse of `rows_from_segments`; past a document's end lies what cuDNN does not read."""
    batch, _, length = lse.shape
    token = segments.starts[:, None] + jnp.arange(length // folded, dtype=jnp.int32)[None, :]
    token = jnp.minimum(token, batch * length - 1)
    return jnp.swapaxes(lse[token // length, :, token % length], 1, 2)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scale: float,
    window: int | None,
    segment_ids: Int[Array, "B T"] | None,
    max_segments: int | None,
    max_document_length: int | None,
    keep: Keep = plain,
) -> Float[Array, "B T N H"]:
    """See `fastft_jax.pallas_kernels.attention.attention`; the problem must have passed `unsupported`.

    cuDNN's `sliding_window_length` counts as Hugging Face's window does: W keys, the query's own among them.
    """
    if window is not None and window >= q.shape[1]:
        window = None
    if segment_ids is None:
        return _flash(q, k, v, None, scale, window, 1, 1, keep)
    if max_segments == 1:
        # Causal already keeps one left-aligned document from its padding; only the padding's own output is wrong.
        # The select's transpose zeroes that output's cotangent, and with it all that padding adds to dk and dv.
        return _zero_padding(_flash(q, k, v, None, scale, window, 1, 1, keep), segment_ids, 1)
    folded = fold(q.shape[1], max_segments, max_document_length)
    segments = find_segments(segment_ids, max_segments, folded)
    return _flash(q, k, v, segments, scale, window, max_segments, folded, keep)


def _flash(q, k, v, segments, scale, window, max_segments, folded, keep):
    static = dict(scale=scale, window=window, max_segments=max_segments, folded=folded)
    forward, backward = functools.partial(_forward, **static), functools.partial(_backward, **static)
    return flash(forward, backward, (q, k, v, segments), keep)


def _forward(q, k, v, segments, *, scale, window, max_segments, folded):
    if segments is None:
        return tuple(
            fused._dot_product_attention_fwd_p_wrapper.bind(
                *_operands(q, k, v), **_parameters(scale, window), is_training=True
            )
        )
    out, lse = fused._dot_product_attention_fwd_p.bind(
        *_packed_operands(q, k, v, segments, folded), **_parameters(scale, window, packed=True), is_training=True
    )
    return _zero_padding(out.reshape(q.shape), segments.ids, max_segments), rows_from_segments(lse, segments)


def _backward(q, k, v, segments, out, lse, d_out, *, scale, window, max_segments, folded):
    if segments is None:
        grads = fused._dot_product_attention_bwd_p_wrapper.bind(
            *_operands(q, k, v), lse, out, d_out, **_parameters(scale, window)
        )
        return *grads, None
    operands = _packed_operands(q, k, v, segments, folded)
    folded_shape = operands[0].shape
    grads = fused._dot_product_attention_bwd_p.bind(
        *operands,
        segments_from_rows(lse, segments, folded),
        out.reshape(folded_shape),
        d_out.reshape(folded_shape),
        **_parameters(scale, window, packed=True),
    )
    real = ((segments.ids > 0) & (segments.ids <= max_segments))[:, :, None, None]
    return *(jnp.where(real, g.reshape(x.shape), 0) for g, x in zip(grads, (q, k, v), strict=True)), None


def _operands(q, k, v):
    return (q, k, v, *[jnp.zeros((0,), q.dtype)] * 7)


def _packed_operands(q, k, v, segments: Segments, folded: int):
    """The kernel's own operands. Its wrapper in jax takes [B, M] lists of a row and merges them by half a dozen small
    kernels in every layer, forward and backward; here that has been done once for all layers (`find_segments`)."""
    batch, length, heads, width = q.shape
    q, k, v = (x.reshape(batch * folded, length // folded, *x.shape[2:]) for x in (q, k, v))
    rows = q.shape[0]
    lengths = segments.lengths.reshape(rows, -1)
    # Starts alone, one more than there are documents: with the end offset added cuDNN gives wrong numbers, no error.
    starts = jnp.concatenate([segments.starts, jnp.full((rows,), batch * length, jnp.int32)]).reshape(rows, -1)
    unused = jnp.zeros((0,), q.dtype)
    offsets = starts * (heads * width), starts * (k.shape[2] * width)  # in elements
    return q, k, v, unused, lengths, lengths, *offsets, unused, unused


def _parameters(scale: float, window: int | None, packed: bool = False) -> dict:
    return dict(
        scale=float(scale),
        seed=42,
        dropout_rate=0.0,
        variadic_args=(False, False),  # no bias, no bias gradient
        mask_type=fused.MaskType.PADDING_CAUSAL if packed else fused.MaskType.CAUSAL,
        layout=fused.AttentionLayout.BTNH.value,
        sliding_window_length=window,
    )


def _zero_padding(out: Float[Array, "B T N H"], ids: Int[Array, "B T"], max_segments: int) -> Float[Array, "B T N H"]:
    """Zeros at padding, where cuDNN writes nothing (whatever lies there may be NaN) or something else.

    More documents than `max_segments` promised would go unseen; they become NaN, which nobody overlooks.
    """
    # Under a scan over layers the mask is loop-invariant, and differentiation moves what is loop-invariant out of the
    # loop: masks and fillings of [B, T, N, H], 200 MB at 2 x 4096 x 32 x 128. Tied to `out` they stay in the fusion.
    ids, out = lax.optimization_barrier((ids, out))
    ids = ids[:, :, None, None]
    fill = jnp.where(ids > max_segments, jnp.nan, 0).astype(out.dtype)
    return jnp.where((ids > 0) & (ids <= max_segments), out, fill)
