"""Linear layers whose weights train: what full fine-tuning has in the place of `lora_linear` and its grouped form."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels.grouped_matmul import grouped_matmul, grouped_matmul_transposed, grouped_outer
from fastft_jax.quant.lora_linear import contract


def trained_linear(x: Float[Array, "... K"], weights: Sequence[Float[Array, "N K"]]) -> Float[Array, "... N"]:
    """x [W_1; ..; W_G]^T, the outputs side by side, in x.dtype; differentiable in x and in every W.

    W is float32 (the master copy) and is cast to x.dtype for the products; dW = dY^T x comes out of a float32
    accumulator unrounded, so a bfloat16 step does not round the gradients of float32 masters.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = _trained_linear(rows, tuple(weights))
    return y.reshape(*x.shape[:-1], y.shape[-1])


@jax.custom_vjp
def _trained_linear(x, weights):
    return contract(x, _below_each_other(weights, x.dtype), 1, 1, x.dtype)


def _forward(x, weights):
    return _trained_linear(x, weights), (x, weights)


def _backward(residuals, dy):
    x, weights = residuals
    dx = contract(dy, _below_each_other(weights, dy.dtype), 1, 0, dy.dtype)
    dw = contract(dy, x, 0, 0, jnp.float32)
    parts = jnp.split(dw, np.cumsum([w.shape[0] for w in weights])[:-1])
    return dx, tuple(part.astype(w.dtype) for part, w in zip(parts, weights, strict=True))


_trained_linear.defvjp(_forward, _backward)


@jax.custom_vjp
def trained_experts(
    x: Float[Array, "M K"], sizes: Int[Array, "E"], weights: Sequence[Float[Array, "E N K"]]
) -> Float[Array, "M N"]:
    """x[m] W_e^T for the rows m of expert e (sorted by expert, `sizes` of each), the outputs of several W side by side.

    On the terms of `trained_linear`: float32 W, cast for the products; dW_e = dY_e^T X_e unrounded, zero for an expert
    without rows.
    """
    return jnp.concatenate([grouped_matmul(x, w.astype(x.dtype), sizes) for w in weights], axis=1)


def _experts_forward(x, sizes, weights):
    return trained_experts(x, sizes, weights), (x, sizes, weights)


def _experts_backward(residuals, dy):
    x, sizes, weights = residuals
    parts = jnp.split(dy, np.cumsum([w.shape[1] for w in weights])[:-1], axis=1)
    pairs = list(zip(parts, weights, strict=True))
    dx = sum(grouped_matmul_transposed(part, w.astype(dy.dtype), sizes) for part, w in pairs)
    return dx, None, tuple(grouped_outer(part, x, sizes).astype(w.dtype) for part, w in pairs)


trained_experts.defvjp(_experts_forward, _experts_backward)


def _below_each_other(weights, dtype) -> Float[Array, "N K"]:
    parts = [w.astype(dtype) for w in weights]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
