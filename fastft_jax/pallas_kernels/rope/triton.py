"""Rotary embedding of a fused q, k, v projection in one kernel each way: a program does every head of one token.

The heads of a token are the rows of a tile. A head is read and written in parts, the two halves that are rotated and
the rest, because a kernel's values cannot be cut; each part's width is rounded up to a power of two and masked.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.rms_norm.rows import power_of_two
from fastft_jax.pallas_kernels.rope.reference import Layout

Parts = list[Float[Array, "heads columns"]]


def _parts(layout: Layout, half: int) -> list[tuple[int, int]]:
    """First column and width of the parts of a head."""
    rest = layout.head_dim - 2 * half
    return [(0, half), (half, half)] + [(2 * half, rest)] * (rest > 0)


def _tile(first: int | Array, heads: int, start: int, width: int) -> tuple[tuple, Bool[Array, "heads columns"]]:
    """Slices and mask of `width` columns of `heads` rows, both rounded up."""
    rows, columns = power_of_two(heads), power_of_two(width)
    inside = (jnp.arange(rows) < heads)[:, None] & (jnp.arange(columns) < width)[None, :]
    return (pallas.ds(first, rows), pallas.ds(start, columns)), inside


def _load(ref, first: int | Array, heads: int, parts: list[tuple[int, int]]) -> Parts:
    tiles = [_tile(first, heads, *part) for part in parts]
    return [pallas.load(ref.at[at], mask=inside, other=0.0).astype(jnp.float32) for at, inside in tiles]


def _store(ref, first: int, heads: int, parts: list[tuple[int, int]], values: Parts) -> None:
    for part, value in zip(parts, values, strict=True):
        at, inside = _tile(first, heads, *part)
        pallas.store(ref.at[at], value.astype(ref.dtype), mask=inside)


def _load_row(ref, start: int, width: int) -> Float[Array, "1 columns"]:
    columns = power_of_two(width)
    inside = jnp.arange(columns) < width
    return pallas.load(ref.at[pallas.ds(start, columns)], mask=inside, other=0.0)[None, :]


def _scales(weight_ref, parts, layout: Layout, dtype) -> Parts:
    """What multiplies the parts of a normalised head: w rounded to the heads' dtype, or 1 + w in float32."""
    weights = [_load_row(weight_ref, *part) for part in parts]
    if layout.plus_one:
        return [1.0 + w.astype(jnp.float32) for w in weights]
    return [w.astype(dtype).astype(jnp.float32) for w in weights]


def _mean(parts: Parts, d: int) -> Float[Array, "heads 1"]:
    return sum(jnp.sum(part, axis=1, keepdims=True) for part in parts) / d


def _rstd(xs: Parts, layout: Layout) -> Float[Array, "heads 1"]:
    return jax.lax.rsqrt(_mean([x * x for x in xs], layout.head_dim) + layout.eps)


def _normalise(xs: Parts, scales: Parts, layout: Layout, dtype) -> Parts:
    """RMSNorm with transformers' roundings, see pallas_kernels/rms_norm."""
    rstd = _rstd(xs, layout)
    rounded = lambda x: x.astype(dtype).astype(jnp.float32)  # noqa: E731
    if layout.plus_one:
        return [rounded(x * rstd * scale) for x, scale in zip(xs, scales, strict=True)]
    return [rounded(rounded(x * rstd) * scale) for x, scale in zip(xs, scales, strict=True)]


def _normalise_backward(dys: Parts, xs: Parts, scales: Parts, layout: Layout) -> Parts:
    rstd = _rstd(xs, layout)
    normed = [x * rstd for x in xs]
    gs = [dy * scale for dy, scale in zip(dys, scales, strict=True)]
    mean = _mean([g * n for g, n in zip(gs, normed, strict=True)], layout.head_dim)
    return [rstd * (g - n * mean) for g, n in zip(gs, normed, strict=True)]


def _first_head(index_refs, layout: Layout, tokens: int) -> int | Array:
    """The row of qkv with this program's first head: of a stack of [tokens] it sees all, else its own token."""
    if not index_refs:
        return 0
    return (index_refs[0][0] * tokens + pallas.program_id(0)) * (layout.num_heads + 2 * layout.num_kv_heads)


def _forward_kernel(*refs, layout: Layout, half: int, tokens: int, stacked: bool) -> None:
    """refs: [index,] qkv or a stack of it, cos, sin[, q and k norm weights], q, k, v."""
    row = _first_head(refs[:stacked], layout, tokens)
    qkv_ref, cos_ref, sin_ref, *norm_refs, q_ref, k_ref, v_ref = refs[stacked:]
    n, k, parts = layout.num_heads, layout.num_kv_heads, _parts(layout, half)
    cos, sin = _load_row(cos_ref, 0, half), _load_row(sin_ref, 0, half)
    for i, (first, heads, out_ref) in enumerate(((0, n, q_ref), (n, k, k_ref))):
        xs = _load(qkv_ref, row + first, heads, parts)
        if norm_refs:
            scales = _scales(norm_refs[i], parts, layout, qkv_ref.dtype)
            xs = _normalise(xs, scales, layout, qkv_ref.dtype)
        a, b, *rest = xs
        _store(out_ref, 0, heads, parts, [a * cos - b * sin, b * cos + a * sin, *rest])
    whole = [(0, layout.head_dim)]
    _store(v_ref, 0, k, whole, _load(qkv_ref, row + n + k, k, whole))


def _backward_kernel(*refs, layout: Layout, half: int, tokens: int, stacked: bool) -> None:
    """refs: [index,] dq, dk, dv, cos, sin[, qkv or a stack of it, q and k norm weights], d_qkv."""
    row = _first_head(refs[:stacked], layout, tokens)
    dq_ref, dk_ref, dv_ref, cos_ref, sin_ref, *norm_refs, d_qkv_ref = refs[stacked:]
    n, k, parts = layout.num_heads, layout.num_kv_heads, _parts(layout, half)
    cos, sin = _load_row(cos_ref, 0, half), _load_row(sin_ref, 0, half)
    for i, (first, heads, d_ref) in enumerate(((0, n, dq_ref), (n, k, dk_ref))):
        a, b, *rest = _load(d_ref, 0, heads, parts)
        ds = [a * cos + b * sin, b * cos - a * sin, *rest]
        if norm_refs:
            qkv_ref, *weight_refs = norm_refs
            xs = _load(qkv_ref, row + first, heads, parts)
            ds = _normalise_backward(ds, xs, _scales(weight_refs[i], parts, layout, qkv_ref.dtype), layout)
        _store(d_qkv_ref, first, heads, parts, ds)
    whole = [(0, layout.head_dim)]
    _store(d_qkv_ref, n + k, k, whole, _load(dv_ref, 0, k, whole))


def forward(
    qkv: Float[Array, "*L_B T (N+2K)*H"],
    cos: Float[Array, "B T P/2"],
    sin: Float[Array, "B T P/2"],
    norms: tuple[Float[Array, "H"], ...],
    layout: Layout,
    index: Int[Array, ""] | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    n, k, h, half = layout.num_heads, layout.num_kv_heads, layout.head_dim, cos.shape[-1]
    b, t, _ = cos.shape
    m = b * t
    indices, index_specs = _index(index)
    source, source_spec = _heads(qkv, layout, index)
    outs = pallas.call(
        functools.partial(_forward_kernel, layout=layout, half=half, tokens=m, stacked=index is not None),
        name="rope_qkv_norm" if norms else "rope_qkv",
        grid=(m,),
        in_specs=[*index_specs, source_spec, _token(half), _token(half), *[_whole(h)] * len(norms)],
        out_specs=[_token(heads, h) for heads in (n, k, k)],
        out_shape=[jax.ShapeDtypeStruct((m, heads, h), qkv.dtype) for heads in (n, k, k)],
        num_warps=_num_warps(layout),
        interpret=interpret,
    )(*indices, source, cos.reshape(m, half), sin.reshape(m, half), *norms)
    return tuple(out.reshape(b, t, *out.shape[1:]) for out in outs)


def backward(
    cotangents: tuple[Array, Array, Array],
    cos: Float[Array, "B T P/2"],
    sin: Float[Array, "B T P/2"],
    norms: tuple[Float[Array, "H"], ...],
    qkv: Float[Array, "*L_B T (N+2K)*H"] | None,
    layout: Layout,
    index: Int[Array, ""] | None = None,
    interpret: bool | None = None,
) -> Float[Array, "B T (N+2K)*H"]:
    n, k, h, half = layout.num_heads, layout.num_kv_heads, layout.head_dim, cos.shape[-1]
    b, t, _ = cos.shape
    m, rows = b * t, n + 2 * k
    index = index if norms else None  # nothing else is read from qkv
    indices, index_specs = _index(index)
    source, source_spec = _heads(qkv, layout, index) if norms else (None, None)
    d_qkv = pallas.call(
        functools.partial(_backward_kernel, layout=layout, half=half, tokens=m, stacked=index is not None),
        name="rope_qkv_norm_backward" if norms else "rope_qkv_backward",
        grid=(m,),
        in_specs=[*index_specs, *(_token(heads, h) for heads in (n, k, k)), _token(half), _token(half)]
        + ([source_spec, _whole(h), _whole(h)] if norms else []),
        out_specs=_token(rows, h),
        out_shape=jax.ShapeDtypeStruct((m, rows, h), cotangents[0].dtype),
        num_warps=_num_warps(layout),
        interpret=interpret,
    )(
        *indices,
        *(d.reshape(m, -1, h) for d in cotangents),
        *(cos.reshape(m, half), sin.reshape(m, half)),
        *([source, *norms] if norms else []),
    )
    return d_qkv.reshape(b, t, rows * h)


def _index(index: Int[Array, ""] | None) -> tuple[list[Array], list[pallas.BlockSpec]]:
    """Operand and its block, if there is one."""
    if index is None:
        return [], []
    return [jnp.asarray(index, jnp.int32).reshape(1)], [pallas.BlockSpec((1,), lambda i: (0,))]


def _heads(qkv: Array, layout: Layout, index: Int[Array, ""] | None) -> tuple[Array, pallas.BlockSpec]:
    """qkv by heads, and what of it a program sees: its token's, or all heads of a stack."""
    rows, h = layout.num_heads + 2 * layout.num_kv_heads, layout.head_dim
    if index is None:
        return qkv.reshape(-1, rows, h), _token(rows, h)
    flat = qkv.reshape(-1, h)
    return flat, pallas.BlockSpec((len(flat) + power_of_two(rows), 2 * h), lambda i: (0, 0))


def _token(*shape: int) -> pallas.BlockSpec:
    """One token of an array [M, *shape], seen twice as large: rounding up a part's size never leaves it."""
    return pallas.BlockSpec((None, *(2 * size for size in shape)), lambda i: (i, *(0 for _ in shape)))


def _whole(size: int) -> pallas.BlockSpec:
    return pallas.BlockSpec((2 * size,), lambda i: (0,))


def _num_warps(layout: Layout) -> int:
    """About 32 query elements a thread."""
    return min(16, max(1, power_of_two(layout.num_heads) * power_of_two(layout.head_dim) // 1024))
