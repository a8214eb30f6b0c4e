"""RMSNorm and the projections that read it as one op: the first half of an attention or a feed-forward block.

y = lora_linear(rms_norm(x)). One op and not two, because the norm's kernel can then write its result into the wide
array that the product with the adapters' columns needs, and its backward kernel can add the residual connection's
gradient, which would cost a pass over the activations each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels.fp8 import rms_norm_rows
from fastft_jax.pallas_kernels.rms_norm import rms_norm, rms_norm_backward
from fastft_jax.quant import fp8
from fastft_jax.quant.lora_linear import (
    Projection,
    adapter_gradients,
    block_diagonal,
    inner_product,
    input_gradient,
    room_of,
    wide_product,
)


class Norm(NamedTuple):
    """What rms_norm needs beside its input and weight."""

    eps: float
    plus_one: bool = False


def norm_linear(
    x: Float[Array, "... D"],
    weight: Float[Array, "D"],
    norm: Norm,
    projections: Sequence[Projection],
    scalings: Sequence[float],
    keep: Callable[[str, Array], Array] = lambda name, value: value,
    *,
    stack: Float[Array, "L ... D"] | None = None,
    index: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "... N"], Float[Array, "... D"]]:
    """`lora_linear(rms_norm(x), projections)`, and x again for the residual connection, whose gradient joins there.

    Norm and linear weights are frozen. The norm's result is computed again in the backward pass. With `stack`, x is
    also what `stack[index]` holds, and is read there by the backward kernel.
    """
    rows, projections = x.reshape(-1, x.shape[-1]), tuple(projections)
    stack = None if stack is None else stack.reshape(stack.shape[0], *rows.shape)
    h, room = None, room_of(projections)
    if room:
        frozen_x, frozen = lax.stop_gradient((rows, projections))
        h = keep("lora_h", inner_product(_normed(frozen_x, weight, norm, frozen)[0], frozen))
    y, rows = _norm_linear(rows, stack, index, weight, h, projections, norm, tuple(scalings))
    return y.reshape(*x.shape[:-1], y.shape[-1]), rows.reshape(x.shape)


def _normed(
    x, weight, norm: Norm, projections
) -> tuple[Float[Array, "M D+room"], tuple[Float[Array, "M D"], Float[Array, "M"]] | None]:
    """The norm's result with room for the adapters; its rows in e4m3 and their scales where the product is in fp8."""
    options = dict(eps=norm.eps, plus_one=norm.plus_one, room=room_of(projections))
    if not fp8.takes(x.shape[0], [p.weight for p in projections]):
        return rms_norm(x, weight, **options), None
    wide, *rows8 = rms_norm_rows(x, weight, **options)
    return wide, tuple(rows8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _norm_linear(x, stack, index, weight, h, projections, norm, scalings):
    wide, rows8 = _normed(x, weight, norm, projections)
    if rows8 is None:
        return wide_product(wide, h, projections, scalings), x
    low_rank = None if h is None else (h, block_diagonal(projections, scalings, x.dtype))
    product = fp8.product_of_rows(*rows8, [p.weight for p in projections], x.dtype)
    return fp8.finished(product, low_rank, x.dtype), x


def _forward(x, stack, index, weight, h, projections, norm, scalings):
    outputs = _norm_linear(x, stack, index, weight, h, projections, norm, scalings)
    return outputs, (x if stack is None else stack, index, weight, h, projections)


def _backward(norm, scalings, residuals, cotangents):
    source, index, weight, h, projections = residuals
    dy, d_residual = cotangents
    d_normed, dh = input_gradient(dy, projections, scalings)
    options = dict(eps=norm.eps, plus_one=norm.plus_one, index=index)
    dx, normed = rms_norm_backward(d_normed, source, weight, d_residual=d_residual, **options)
    gradients = adapter_gradients(normed, h, dh, dy, projections, scalings)
    return dx, None, None, None, None, gradients


_norm_linear.defvjp(_forward, _backward)
