"""Linear layers whose weights train: what full fine-tuning has in the place of `lora_linear`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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


def _below_each_other(weights, dtype) -> Float[Array, "N K"]:
    parts = [w.astype(dtype) for w in weights]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
