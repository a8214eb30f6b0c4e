"""Rotary position embedding of queries and keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H/2"], sin: Float[Array, "B T H/2"]
) -> Float[Array, "B T N H"]:
    """`[a cos - b sin, b cos + a sin]` with a, b the two halves of each head, in float32, cast back to x's dtype.

    Halves (not even and odd elements) are paired, as transformers' `rotate_half` does.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
