"""Gated linear units: the activation half of a gated feed-forward layer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def silu_glu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """`silu(gate) * up`: the activation in float32, rounded to the input dtype before the product (as transformers).

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
