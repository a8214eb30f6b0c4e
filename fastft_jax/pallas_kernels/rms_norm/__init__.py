"""Root-mean-square normalisation, alone or of a sum, with room for a LoRA product beside its output."""

import functools
from typing import Literal, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.rms_norm import reference
from fastft_jax.pallas_kernels.rms_norm.rows import MAX_TRAINED_WIDTH, MAX_WIDTH

Implementation = Literal["xla", "triton"]

__all__ = ["Implementation", "add_rms_norm", "rms_norm", "rms_norm_backward"]


def rms_norm(
    x: Float[Array, "*B D"],
    weight: Float[Array, "D"],
    *,
    eps: float,
    plus_one: bool = False,
    train_weight: bool = False,
    room: int = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "*B D+room"]:
    """`weight * (x / sqrt(mean(x^2) + eps)).astype(x.dtype)`, in x's dtype.

    The mean and the quotient are float32; the quotient is rounded to x's dtype before the weight multiplies it, which
    is the order transformers uses (LlamaRMSNorm). With `plus_one` the factor is 1 + weight and the product is float32,
    rounded once (GemmaRMSNorm). `room` appends that many columns of zeros, so that a caller can write a LoRA product
    there and feed one GEMM; their cotangent is ignored.

    The gradient of x recomputes the quotient from x. The weight's is zero, at no cost, unless `train_weight`.
    `implementation` None picks "triton" on a GPU up to D = 16384 (8192 with `train_weight`), "xla" elsewhere. Raises
    ValueError for shapes and names that do not fit. Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    return _rms_norm(x, weight, _options(x, weight, eps, plus_one, train_weight, room, implementation))


def add_rms_norm(
    x: Float[Array, "*B D"],
    delta: Float[Array, "*B D"],
    weight: Float[Array, "D"],
    *,
    eps: float,
    plus_one: bool = False,
    train_weight: bool = False,
    room: int = 0,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D+room"]]:
    """`h = x + delta`, rounded to x's dtype, and `rms_norm(h, weight, ...)`: a residual addition and the norm after it.

    Only h is kept for the gradient, which is the same array for x and for delta. Raises ValueError if x and delta
    differ in shape or dtype, and as `rms_norm` does.
    """
    if x.shape != delta.shape or x.dtype != delta.dtype:
        raise ValueError(f"x and delta must be alike, got {x.dtype}{x.shape} and {delta.dtype}{delta.shape}")
    return _add_rms_norm(x, delta, weight, _options(x, weight, eps, plus_one, train_weight, room, implementation))


def rms_norm_backward(
    dy: Float[Array, "*B D+room"],
    x: Float[Array, "*L_B D"],
    weight: Float[Array, "D"],
    *,
    eps: float,
    plus_one: bool = False,
    d_residual: Float[Array, "*B D"] | None = None,
    index: Int[Array, ""] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """The cotangent of x from dy, that of `rms_norm(x, weight, ...)`, and that norm's result again, from one pass over
    x: for use inside another op's backward pass.

    With n = x rstd and g = dy * weight: `rstd (g - n mean(g n)) + d_residual`, float32 throughout, one cast to x's
    dtype; `d_residual` is what x receives from elsewhere. Columns of dy beyond D are ignored. With `index`, x is a
    stack [L, ..., D], of which that one is read where it lies.
    """
    lead = x.shape[:-1] if index is None else x.shape[1:-1]
    options = _options(x, weight, eps, plus_one, False, dy.shape[-1] - x.shape[-1], implementation)
    if dy.shape[:-1] != lead or (d_residual is not None and d_residual.shape != (*lead, x.shape[-1])):
        raise ValueError(f"cotangents do not fit x {x.shape}: dy {dy.shape}, d_residual {jax.typeof(d_residual)}")
    more = dict(eps=eps, plus_one=plus_one, with_normed=True)
    if options.implementation == "triton":
        more["index"] = index
    elif index is not None:  # XLA fuses a slice into what reads it
        x = jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    return _kernels(options).backward(dy, x, weight, d_residual, **more)


class _Options(NamedTuple):
    eps: float
    plus_one: bool
    train_weight: bool
    room: int
    implementation: Implementation


def _options(x, weight, eps, plus_one, train_weight, room, implementation) -> _Options:
    if x.ndim < 1 or weight.shape != x.shape[-1:] or room < 0:
        raise ValueError(f"x [..., D], weight [D] and room >= 0 do not fit: {x.shape}, {weight.shape}, {room}")
    implementation = select_implementation(x.shape[-1], train_weight, implementation)
    return _Options(eps, plus_one, train_weight, room, implementation)


def select_implementation(d: int, train_weight: bool, implementation: Implementation | None) -> Implementation:
    """The implementation for rows of D columns; ValueError for one that does not exist or does not take them."""
    if implementation not in (None, "xla", "triton"):
        raise ValueError(f"unknown norm implementation {implementation!r}: use None, 'xla' or 'triton'")
    widest = MAX_TRAINED_WIDTH if train_weight else MAX_WIDTH
    if implementation == "triton" and d > widest:
        trained = " when the weight is trained" if train_weight else ""
        raise ValueError(f"the triton norm kernels take rows of up to {widest}{trained}, got {d}")
    return implementation or ("triton" if pallas.on_gpu() and d <= widest else "xla")


def _kernels(options: _Options):
    if options.implementation == "xla":
        return reference
    from fastft_jax.pallas_kernels.rms_norm import triton

    return triton


def _backward(options: _Options, dy, x, weight, d_residual):
    return _kernels(options).backward(
        dy, x, weight, d_residual, eps=options.eps, plus_one=options.plus_one, train_weight=options.train_weight
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x, weight, options):
    return _kernels(options).forward(x, weight, eps=options.eps, plus_one=options.plus_one, room=options.room)


def _rms_norm_forward(x, weight, options):
    return _rms_norm(x, weight, options), (x, weight)


def _rms_norm_backward(options, saved, dy):
    return _backward(options, dy, *saved, None)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _add_rms_norm(x, delta, weight, options):
    return _kernels(options).add_forward(
        x, delta, weight, eps=options.eps, plus_one=options.plus_one, room=options.room
    )


def _add_rms_norm_forward(x, delta, weight, options):
    h, y = _add_rms_norm(x, delta, weight, options)
    return (h, y), (h, weight)


def _add_rms_norm_backward(options, saved, cotangents):
    d_h, dy = cotangents
    dx, dw = _backward(options, dy, *saved, d_h)
    return dx, dx, dw


_add_rms_norm.defvjp(_add_rms_norm_forward, _add_rms_norm_backward)
