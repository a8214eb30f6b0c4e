"""Frozen linear layers of E experts with LoRA's pairs, over rows sorted by expert.

y_i[m] = x[m] W_ie^T + s_i (x[m] A_ie^T) B_ie^T for the rows m of expert e; i = 1..G linears read the same x. As
`lora_linear`, for one matrix an expert: W is quantised (decoded again in the backward pass) or plain, and frozen; all G
are one product with [W_1e; ..; W_Ge], an expert's rows below each other, and a block-diagonal B_e = (s_i B_ie). Frozen
biases are one more column of B_e, against a column of ones beside the low-rank h: they cost no pass over y.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import nf4
from fastft_jax.pallas_kernels.grouped_matmul import grouped_matmul, grouped_matmul_transposed, grouped_outer
from fastft_jax.quant import int8
from fastft_jax.quant.int8 import Int8Array
from fastft_jax.quant.lora_linear import Projection, decoded_in_place, rank_slices
from fastft_jax.quant.nf4 import NF4Array, dequantize_stack

COLUMNS = 16  # the least depth of the kernel's step


def grouped_lora_linear(
    x: Float[Array, "M K"],
    sizes: Int[Array, "E"],
    projections: Sequence[Projection],
    scalings: Sequence[float],
    keep: Callable[[str, Array], Array] = lambda name, value: value,
    bias: Float[Array, "E N"] | None = None,
) -> Float[Array, "M N"]:
    """The outputs of all projections side by side, [M, N_1 + .. + N_G], in x.dtype; differentiable in x, A and B.

    Each projection has a weight [E, N, K] and, if it is adapted, float32 A [E, R, K] and B [E, N, R]. The first
    sizes[0] rows of x are expert 0's, and so on; the sizes sum to M. dA and dB come out of float32 accumulators.
    `bias`, of all projections side by side, is cast to x.dtype, added in the accumulator, and takes no gradient.
    """
    projections = tuple(projections)
    h = inner(*lax.stop_gradient((x, sizes, projections)))
    return _grouped(x, sizes, None if h is None else keep("lora_h", h), bias, projections, tuple(scalings))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _grouped(x, sizes, h, bias, projections, scalings):
    """The product given h; h takes no gradient: A's is computed with the rest."""
    return outputs(x, h, sizes, projections, scalings, bias)


def _forward(x, sizes, h, bias, projections, scalings):
    return _grouped(x, sizes, h, bias, projections, scalings), (x, sizes, h, projections)


def _backward(scalings, residuals, dy):
    x, sizes, h, projections = residuals
    dx, dh, _ = input_gradient(dy, sizes, projections, scalings)
    return dx, None, None, None, adapter_gradients(x, h, dh, dy, sizes, projections, scalings)


_grouped.defvjp(_forward, _backward)


def inner(x: Float[Array, "M K"], sizes: Int[Array, "E"], projections: Sequence[Projection]) -> Array | None:
    """h[m] = [x[m] A_1e^T, .., x[m] A_Ge^T], [M, R_1 + .. + R_G]; None where nothing is adapted."""
    return grouped_matmul(x, _all_a(projections, x.dtype), sizes) if _adapted(projections) else None


def outputs(
    x: Float[Array, "M K"],
    h: Float[Array, "M R"] | None,
    sizes: Int[Array, "E"],
    projections: Sequence[Projection],
    scalings: Sequence[float],
    bias: Float[Array, "E N"] | None = None,
    scale: Float[Array, "M"] | None = None,
) -> Float[Array, "M N"]:
    """x[m] W_e^T + h[m] B_e^T + scale[m] bias_e; without a scale it is 1."""
    b = _low_rank(projections, scalings, bias, x.dtype)
    if bias is not None:
        h = _with_column(h, jnp.ones(len(x), x.dtype) if scale is None else scale.astype(x.dtype))
    return grouped_matmul(x, _all_weights(projections, x.dtype), sizes, None if b is None else (h, b))


def input_gradient(
    dy: Float[Array, "M N"],
    sizes: Int[Array, "E"],
    projections: Sequence[Projection],
    scalings: Sequence[float],
    bias: Float[Array, "E N"] | None = None,
) -> tuple[Float[Array, "M K"], Float[Array, "M R"] | None, Float[Array, "M"] | None]:
    """dx[m] = dy[m] W_e + dh[m] A_e, and dh[m] = dy[m] B_e; with a bias d_scale[m] = dy[m] bias_e, too.

    dx and dh do not depend on the bias. d_scale, in dy's dtype, is a column of the product that gives dh.
    """
    b = _low_rank(projections, scalings, bias, dy.dtype)
    dh = None if b is None else grouped_matmul_transposed(dy, b, sizes)
    low_rank = d_scale = None
    if bias is not None:
        rank = _rank_slices(projections)[-1].stop
        dh, d_scale = dh[:, :rank] if rank else None, dh[:, rank]
    if dh is not None:
        low_rank = dh, _all_a(projections, dy.dtype)
    return grouped_matmul_transposed(dy, _all_weights(projections, dy.dtype), sizes, low_rank), dh, d_scale


def adapter_gradients(x, h, dh, dy, sizes, projections: Sequence[Projection], scalings) -> tuple[Projection, ...]:
    """dA [E, R, K] and dB [E, N, R] of each, from one pass over x and one over dY; None where there is no adapter."""
    if h is None:
        return tuple(Projection(None) for _ in projections)
    da, db = grouped_outer(dh, x, sizes), grouped_outer(dy, h, sizes)
    out, first = [], 0
    for p, s, at in zip(projections, scalings, _rank_slices(projections), strict=True):
        last = first + p.weight.shape[-2]
        if p.a is None:
            out.append(Projection(None))
        else:
            db_i = db[:, first:last, at] * s
            out.append(Projection(None, da[:, at].astype(p.a.dtype), db_i.astype(p.b.dtype)))
        first = last
    return tuple(out)


def _adapted(projections: Sequence[Projection]) -> bool:
    return any(p.a is not None for p in projections)


def _rank_slices(projections: Sequence[Projection]) -> list[slice]:
    """Which columns of h are each projection's."""
    return rank_slices([p if p.a is None else p._replace(a=p.a[0]) for p in projections])


def _all_a(projections: Sequence[Projection], dtype) -> Float[Array, "E R K"]:
    return jnp.concatenate([p.a.astype(dtype) for p in projections if p.a is not None], axis=1)


def _low_rank(projections: Sequence[Projection], scalings, bias: Float[Array, "E N"] | None, dtype) -> Array | None:
    """[B_e, bias_e], what h and the column beside it are multiplied with; None where there is neither."""
    b = _block_diagonal(projections, scalings, dtype) if _adapted(projections) else None
    return b if bias is None else _with_column(b, bias.astype(dtype))


def _with_column(matrix: Float[Array, "*X R"] | None, column: Float[Array, "*X"]) -> Float[Array, "*X any"]:
    """[matrix, column, 0, ..]: a multiple of 16 columns, so that every row's loads stay aligned."""
    parts = [column[..., None]] if matrix is None else [matrix, column[..., None]]
    wide = jnp.concatenate(parts, axis=-1)
    return jnp.pad(wide, [(0, 0)] * column.ndim + [(0, -wide.shape[-1] % COLUMNS)])


def _block_diagonal(projections: Sequence[Projection], scalings: Sequence[float], dtype) -> Float[Array, "E N R"]:
    """All s_i B_i."""
    slices = _rank_slices(projections)
    experts, rank = next(len(p.b) for p in projections if p.b is not None), slices[-1].stop
    blocks = [
        jnp.zeros((experts, p.weight.shape[-2], rank), dtype)
        if p.a is None
        else jnp.pad((p.b * s).astype(dtype), ((0, 0), (0, 0), (at.start, rank - at.stop)))
        for p, s, at in zip(projections, scalings, slices, strict=True)
    ]
    return jnp.concatenate(blocks, axis=1)


def _all_weights(projections: Sequence[Projection], dtype) -> Float[Array, "E N K"]:
    """Each expert's weights below each other; the NF4 kernel writes them there straight from the stack."""
    if decoded_in_place(projections):
        return _decode(projections, dtype)
    parts = [_plain(p.weight, dtype) for p in projections]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _decode(projections: Sequence[Projection], dtype) -> Float[Array, "E N K"]:
    n, k = sum(p.weight.shape[0] for p in projections), projections[0].weight.shape[1]
    into, row = None, 0
    for p in projections:
        *leaves, layer = p.weight.in_stack()  # [L, E, ..]
        experts = leaves[0].shape[1]
        flat = [None if leaf is None else leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves]
        place = dict(shape=p.weight.shape, size=(experts * n, k), row=row, count=experts, step=n)
        into = nf4.decode_into(into, *flat, layer * experts, **place, dtype=dtype)
        row += p.weight.shape[0]
    return into.reshape(experts, n, k)


def _plain(weight: NF4Array | Int8Array | Float[Array, "E N K"], dtype) -> Float[Array, "E N K"]:
    if isinstance(weight, Int8Array):
        return jax.vmap(lambda each: int8.dequantize(each, dtype))(weight)
    return dequantize_stack(weight, dtype) if isinstance(weight, NF4Array) else weight.astype(dtype)
