"""Products with frozen quantised weights and with LoRA's pair, each with a backward pass that keeps little memory."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastft_jax.quant.nf4 import NF4Array, dequantize


def _contract(x: Array, w: Array, x_axis: int, w_axis: int, dtype: jax.typing.DTypeLike) -> Array:
    """Sum over one axis of each; hardware accumulates 16-bit products in float32 whatever the result's dtype is.

    float32 means float32: a GPU's default would round the factors to TF32. 16-bit products are exact either way.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, w, (((x_axis,), (w_axis,)), ((), ())), precision, preferred_element_type=dtype)


@jax.custom_vjp
def _matmul_nf4(x: Float[Array, "... K"], w: NF4Array) -> Float[Array, "... N"]:
    return _contract(x, dequantize(w, x.dtype), x.ndim - 1, 1, x.dtype)


def _matmul_nf4_forward(x, w):
    return _matmul_nf4(x, w), w


def _matmul_nf4_backward(w, dy):
    # The weight is decoded again: one cheap pass over its codes instead of a residual four times their size.
    return _contract(dy, dequantize(w, dy.dtype), dy.ndim - 1, 0, dy.dtype), None


_matmul_nf4.defvjp(_matmul_nf4_forward, _matmul_nf4_backward)


def matmul(x: Float[Array, "... K"], w: Float[Array, "N K"] | NF4Array) -> Float[Array, "... N"]:
    """y = x W^T, in x.dtype, accumulated in float32.

    An NF4 weight is frozen: it is decoded to x.dtype, its codes and scales are the only residuals, dx = dy W, and it
    has no gradient. A plain array is an ordinary product, differentiable in both, cast to x.dtype first. Raises
    ValueError when the widths differ.
    """
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"cannot multiply {x.shape} with the transpose of a weight of shape {w.shape}")
    if isinstance(w, NF4Array):
        return _matmul_nf4(x, w)
    return _contract(x, w.astype(x.dtype), x.ndim - 1, 1, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def lora(
    x: Float[Array, "... K"], a: Float[Array, "R K"], b: Float[Array, "N R"], scaling: float
) -> Float[Array, "... N"]:
    """y = scaling (x A^T) B^T in x.dtype, for float32 A and B; scaling is a Python number (PEFT's alpha / r).

    A and B are cast to x.dtype for the products; dA and dB come out of float32 accumulators in A's and B's own dtype,
    so a bfloat16 step does not round the gradients of the float32 masters. Residuals: x, A, B (x A^T is R wide and
    computed again). Source: LoRA (arXiv 2106.09685), PEFT's lora.Linear.
    """
    last = x.ndim - 1
    return _contract(_contract(x, a.astype(x.dtype), last, 1, x.dtype), b.astype(x.dtype), last, 1, x.dtype) * scaling


def _lora_forward(x, a, b, scaling):
    return lora(x, a, b, scaling), (x, a, b)


def _lora_backward(scaling, residuals, dy):
    x, a, b = residuals
    dtype, last = x.dtype, x.ndim - 1
    # scaling goes to the R-wide factors: multiplying dy would read and write all of it again
    dh = _contract(dy, b.astype(dtype), last, 0, dtype) * scaling  # [..., R]
    h = _contract(x, a.astype(dtype), last, 1, dtype)
    flat = lambda t: t.reshape(-1, t.shape[-1])  # noqa: E731
    da = _contract(flat(dh), flat(x), 0, 0, jnp.float32).astype(a.dtype)
    db = (_contract(flat(dy), flat(h), 0, 0, jnp.float32) * scaling).astype(b.dtype)
    return _contract(dh, a.astype(dtype), last, 0, dtype), da, db


lora.defvjp(_lora_forward, _lora_backward)
