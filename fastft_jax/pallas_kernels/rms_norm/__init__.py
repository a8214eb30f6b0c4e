"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, "D"], *, eps: float) -> Float[Array, "*B D"]:
    """`weight * (x / sqrt(mean(x^2) + eps)).astype(x.dtype)`.

    The mean and the quotient are float32; the quotient is rounded to x's dtype before the weight multiplies it, which
    is the order transformers uses (LlamaRMSNorm). Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    xf = x.astype(jnp.float32)
    normed = xf * jax.lax.rsqrt(jnp.mean(xf * xf, axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * normed.astype(x.dtype)
