"""Linear layers with frozen weights and LoRA's pairs, several that read one input at once, as few large GEMMs.

y_i = x W_i^T + s_i (x A_i^T) B_i^T for i = 1..G. With h = [x A_1^T, .., x A_G^T] and the block-diagonal B = (s_i B_i),
all of it is ONE product, [x, h] [W, B]^T: the adapter's columns ride in the base's GEMM, whose accumulator adds them in
float32, where skinny GEMMs beside it cost a seventh of a training step. Backward, dh = dY B and, where the output is no
wider than the input, dx = [dY, dh] [[W], [A]] in one GEMM too; dA_i = dh_i^T x, dB_i = s_i dY_i^T h_i. In float32,
which is for exactness, the two parts are summed apart.

Where the weights say so, the base's part of these products runs in fp8 (`fp8.py`) and the adapter's is added to it.

Source: LoRA (arXiv 2106.09685), PEFT's lora.Linear for the values.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels import nf4
from fastft_jax.quant import fp8
from fastft_jax.quant.dense import dense
from fastft_jax.quant.few_rows import few_row_product
from fastft_jax.quant.int8 import Int8Array
from fastft_jax.quant.nf4 import BLOCK, NF4Array


class Projection(NamedTuple):
    """One frozen weight [N, K] and its adapter, if it has one: A float32 [R, K], B float32 [N, R]."""

    weight: Float[Array, "N K"] | NF4Array | Int8Array
    a: Float[Array, "R K"] | None = None
    b: Float[Array, "N R"] | None = None


def contract(x: Array, w: Array, x_axis: int, w_axis: int, dtype: jax.typing.DTypeLike) -> Array:
    """Sum over one axis of each; hardware accumulates 16-bit products in float32 whatever the result's dtype is.

    float32 means float32: a GPU's default would round the factors to TF32. 16-bit products are exact either way.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, w, (((x_axis,), (w_axis,)), ((), ())), precision, preferred_element_type=dtype)


def lora_linear(
    x: Float[Array, "... K"],
    projections: Sequence[Projection],
    scalings: Sequence[float],
    dropped: Sequence[Float[Array, "... K"] | None] | None = None,
    keep: Callable[[str, Array], Array] = lambda name, value: value,
) -> Float[Array, "... N"]:
    """The outputs of all projections side by side, [..., N_1 + .. + N_G], in x.dtype; differentiable in x, A and B.

    scalings: PEFT's alpha / r (or alpha / sqrt(r)) of each, Python numbers. dropped: what each adapter reads instead of
    x (x after dropout), or None. Weights are frozen: codes are decoded again in the backward pass, so that they are
    the only residual. A and B are cast to x.dtype for the products; dA and dB come out of float32 accumulators in their
    own dtype, so a bfloat16 step does not round the gradients of float32 masters. h = x A^T goes through
    keep("lora_h", h), which may return a copy kept earlier. Raises ValueError when
    the widths differ.
    """
    for p in projections:
        if x.shape[-1] != p.weight.shape[1]:
            raise ValueError(f"cannot multiply {x.shape} with the transpose of a weight of shape {p.weight.shape}")
    rows = x.reshape(-1, x.shape[-1])
    if dropped is None or all(p.a is None for p in projections):
        inputs = None
    else:
        inputs = tuple((x if d is None else d).reshape(rows.shape) for d in dropped)
    h, room = None, room_of(projections)
    if room:
        x_, inputs_, projections_ = lax.stop_gradient((rows, inputs, tuple(projections)))
        h = keep("lora_h", inner_product(x_, projections_, inputs_))
    y = _lora_linear(rows, inputs, h, tuple(projections), tuple(scalings))
    return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _lora_linear(x, inputs, h, projections, scalings):
    """The product and its gradients, given h; h takes no gradient: A's is computed with the rest."""
    return wide_product(_widened(x, room_of(projections)), h, projections, scalings)


def _forward(x, inputs, h, projections, scalings):
    return _lora_linear(x, inputs, h, projections, scalings), (x, inputs, h, projections)


def _backward(scalings, residuals, dy):
    x, inputs, h, projections = residuals
    dx, dh = input_gradient(dy, projections, scalings, through_adapters=inputs is None)
    d_inputs = None
    if inputs is not None:
        d_inputs = tuple(
            jnp.zeros_like(u) if p.a is None else contract(dh[:, at], p.a.astype(dy.dtype), 1, 0, dy.dtype)
            for u, p, at in zip(inputs, projections, rank_slices(projections), strict=True)
        )
    return dx, d_inputs, None, adapter_gradients(x, h, dh, dy, projections, scalings, inputs)


_lora_linear.defvjp(_forward, _backward)


def inner_product(
    x: Float[Array, "M any"], projections: Sequence[Projection], inputs: Sequence[Array] | None = None
) -> Float[Array, "M room"]:
    """h = [x A_1^T, .., x A_G^T], zeros in the rest of the room; from x, wide or not, or from each one's own input."""
    room, dtype = room_of(projections), x.dtype
    if inputs is None:  # a wide x is read as it is, against zeros: the narrow one need not exist
        a = below_each_other(projections, dtype)
        return contract(x, jnp.pad(a, ((0, 0), (0, x.shape[1] - a.shape[1]))), 1, 1, dtype)
    each = [
        contract(u, p.a.astype(dtype), 1, 1, dtype) for u, p in zip(inputs, projections, strict=True) if p.a is not None
    ]
    return jnp.pad(jnp.concatenate(each, axis=1), ((0, 0), (0, room - _rank(projections))))


def wide_product(
    wide: Float[Array, "M K+room"],
    h: Float[Array, "M room"] | None,
    projections: Sequence[Projection],
    scalings: Sequence[float],
) -> Float[Array, "M N"]:
    """[x, h] [W, B]^T; what is in x's room is overwritten. h is None without adapters."""
    weights = [p.weight for p in projections]
    few = few_row_product(wide[:, : weights[0].shape[1]], weights)
    if few is not None:
        return few if h is None else few + contract(h, block_diagonal(projections, scalings, h.dtype), 1, 1, h.dtype)
    if fp8.chosen(weights):
        low_rank = None if h is None else (h, block_diagonal(projections, scalings, wide.dtype))
        return fp8.product(wide, weights, low_rank)
    if h is None:
        return contract(wide, _stacked_rows(projections, wide.dtype), 1, 1, wide.dtype)
    if wide.dtype == jnp.float32:  # nothing to win in speed, and a sum of sums is closer to the exact value
        x = wide[:, : weights[0].shape[1]]
        ones = [1.0] * len(projections)
        low_rank = contract(
            h * _each_scaling(projections, scalings), block_diagonal(projections, ones, h.dtype), 1, 1, h.dtype
        )
        return contract(x, _stacked_rows(projections, x.dtype), 1, 1, x.dtype) + low_rank
    wide = lax.dynamic_update_slice(wide, h, (0, wide.shape[1] - h.shape[1]))
    b = block_diagonal(projections, scalings, wide.dtype)
    return contract(wide, _with_columns(projections, b, wide.dtype), 1, 1, wide.dtype)


def input_gradient(
    dy: Float[Array, "M N"], projections: Sequence[Projection], scalings: Sequence[float], through_adapters: bool = True
) -> tuple[Float[Array, "M K"], Float[Array, "M room"] | None]:
    """dx = dY W + dh A (without the second term unless `through_adapters`), and dh = dY B."""
    dtype, weights = dy.dtype, [p.weight for p in projections]
    in_fp8 = fp8.chosen(weights)
    if not room_of(projections):
        dx = fp8.gradient(dy, weights) if in_fp8 else contract(dy, _stacked_rows(projections, dtype), 1, 0, dtype)
        return dx, None
    a = below_each_other(projections, dtype)
    dh = contract(dy, block_diagonal(projections, scalings, dtype), 1, 0, dtype)
    if in_fp8:
        return fp8.gradient(dy, weights, (dh, a.T) if through_adapters else None), dh
    if through_adapters and dy.shape[1] <= a.shape[1]:
        # one product; a copy of the narrow dY is cheaper than another pass over the wide dx
        return contract(jnp.concatenate([dy, dh], axis=1), _stacked_rows(projections, dtype, a), 1, 0, dtype), dh
    dx = contract(dy, _stacked_rows(projections, dtype), 1, 0, dtype)
    return dx + contract(dh, a, 1, 0, dtype) if through_adapters else dx, dh


def adapter_gradients(
    x: Float[Array, "M K"],
    h: Float[Array, "M room"] | None,
    dh: Float[Array, "M room"] | None,
    dy: Float[Array, "M N"],
    projections: Sequence[Projection],
    scalings: Sequence[float],
    inputs: Sequence[Float[Array, "M K"]] | None = None,
) -> tuple[Projection, ...]:
    """dA [R, K] and dB [N, R] of each, from one pass over x and one over dY where the inputs are the same."""
    if h is None:
        return tuple(Projection(None) for _ in projections)
    da = None if inputs is not None else contract(dh, x, 0, 0, jnp.float32)
    db = contract(dy, h, 0, 0, jnp.float32)
    out, first = [], 0
    for i, (p, s, at) in enumerate(zip(projections, scalings, rank_slices(projections), strict=True)):
        n = p.weight.shape[0]
        if p.a is None:
            out.append(Projection(None))
        else:
            da_i = contract(dh[:, at], inputs[i], 0, 0, jnp.float32) if da is None else da[at]
            db_i = db[first : first + n, at] * s
            out.append(Projection(None, da_i.astype(p.a.dtype), db_i.astype(p.b.dtype)))
        first += n
    return tuple(out)


def _rank(projections: Sequence[Projection]) -> int:
    return sum(0 if p.a is None else p.a.shape[0] for p in projections)


def room_of(projections: Sequence[Projection]) -> int:
    """Columns for all adapters: their ranks, up to a multiple of 64, where GEMMs stay aligned."""
    return -(-_rank(projections) // BLOCK) * BLOCK


def rank_slices(projections: Sequence[Projection]) -> list[slice]:
    slices, first = [], 0
    for p in projections:
        last = first + (0 if p.a is None else p.a.shape[0])
        slices.append(slice(first, last))
        first = last
    return slices


def _each_scaling(projections, scalings) -> np.ndarray:
    """The scaling of each column of the room."""
    row = np.zeros(room_of(projections), np.float32)
    for at, s in zip(rank_slices(projections), scalings, strict=True):
        row[at] = s
    return row


def _widened(x: Float[Array, "M K"], room: int) -> Float[Array, "M K+room"]:
    return jnp.pad(x, ((0, 0), (0, room)))


def below_each_other(projections, dtype) -> Float[Array, "room K"]:
    """All A; zeros fill the room."""
    a = jnp.concatenate([p.a.astype(dtype) for p in projections if p.a is not None])
    return jnp.pad(a, ((0, room_of(projections) - a.shape[0]), (0, 0)))


def block_diagonal(projections, scalings, dtype) -> Float[Array, "N room"]:
    """All s_i B_i."""
    room = room_of(projections)
    blocks = [
        jnp.zeros((p.weight.shape[0], room), dtype)
        if p.a is None
        else jnp.pad((p.b * s).astype(dtype), ((0, 0), (at.start, room - at.stop)))
        for p, s, at in zip(projections, scalings, rank_slices(projections), strict=True)
    ]
    return jnp.concatenate(blocks)


def _with_columns(projections, columns: Float[Array, "N room"], dtype) -> Float[Array, "N K+room"]:
    n, k = columns.shape[0], projections[0].weight.shape[1]
    if decoded_in_place(projections):
        return lax.dynamic_update_slice(_decode(projections, (n, k + columns.shape[1]), dtype), columns, (0, k))
    return jnp.concatenate([_stacked_rows(projections, dtype), columns], axis=1)


def _stacked_rows(projections, dtype, below: Float[Array, "room K"] | None = None) -> Float[Array, "N+room K"]:
    """All weights below each other, then `below`."""
    extra = 0 if below is None else below.shape[0]
    n, k = sum(p.weight.shape[0] for p in projections), projections[0].weight.shape[1]
    if decoded_in_place(projections):
        w = _decode(projections, (n + extra, k), dtype)
        return w if below is None else lax.dynamic_update_slice(w, below, (n, 0))
    parts = [dense(p.weight, dtype) for p in projections]
    parts += [] if below is None else [below]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def decoded_in_place(projections: Sequence[Projection]) -> bool:
    """Whether the NF4 kernel can write these weights straight into one buffer."""
    return all(
        isinstance(p.weight, NF4Array) and p.weight.shape[1] % BLOCK == 0 and nf4.kernel_takes(p.weight.codes)
        for p in projections
    )


def _decode(projections: Sequence[Projection], size: tuple[int, int], dtype) -> Float[Array, "rows width"]:
    into, row = None, 0
    for p in projections:
        w = p.weight
        into = nf4.decode_into(into, *w.in_stack(), shape=w.shape, size=size, row=row, dtype=dtype)
        row += w.shape[0]
    return into
