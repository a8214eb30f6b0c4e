"""Layer normalisation, with room for a LoRA product beside its output."""

import functools
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels.layer_norm import reference
from fastft_jax.pallas_kernels.rms_norm import Implementation, select_implementation

__all__ = ["Implementation", "layer_norm"]


def layer_norm(
    x: Float[Array, "*B D"],
    weight: Float[Array, "D"],
    bias: Float[Array, "D"] | None,
    *,
    eps: float,
    train_weight: bool = False,
    room: int = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "*B D+room"]:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`: float32, then one cast to x's dtype (as torch does).

    `room` appends that many columns of zeros, so that a caller can write a LoRA product there and feed one GEMM; their
    cotangent is ignored. The gradient of x recomputes the quotient from x; those of weight and bias are zero, at no
    cost, unless `train_weight`. `implementation` None picks "triton" on a GPU up to D = 16384 (8192 with
    `train_weight`), "xla" elsewhere. Raises ValueError for shapes and names that do not fit.
    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    fits = x.ndim > 0 and weight.shape == x.shape[-1:] and (bias is None or bias.shape == weight.shape)
    if not fits or room < 0:
        raise ValueError(
            f"x [..., D], weight [D], bias [D] and room >= 0 do not fit: {x.shape}, {weight.shape}, "
            f"{None if bias is None else bias.shape}, {room}"
        )
    implementation = select_implementation(x.shape[-1], train_weight, implementation)
    return _layer_norm(x, weight, bias, _Options(eps, train_weight, room, implementation))


class _Options(NamedTuple):
    eps: float
    train_weight: bool
    room: int
    implementation: Implementation


def _kernels(options: _Options):
    if options.implementation == "xla":
        return reference
    from fastft_jax.pallas_kernels.layer_norm import triton

    return triton


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x, weight, bias, options):
    return _kernels(options).forward(x, weight, bias, eps=options.eps, room=options.room)


def _forward(x, weight, bias, options):
    return _layer_norm(x, weight, bias, options), (x, weight, bias)


def _backward(options, saved, dy):
    x, weight, bias = saved
    dx, dw, db = _kernels(options).backward(dy, x, weight, eps=options.eps, train_weight=options.train_weight)
    if dw is None:
        return dx, None, None
    return dx, dw.astype(weight.dtype), None if bias is None else db.astype(bias.dtype)


_layer_norm.defvjp(_forward, _backward)
