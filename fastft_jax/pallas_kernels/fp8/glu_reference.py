"""Gated linear units of products that are still sums and scales, as the ops that they consist of."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels.fp8.reference import rescale_add
from fastft_jax.pallas_kernels.glu import reference as glu
from fastft_jax.pallas_kernels.glu.reference import Activation


def forward(
    sums: Float[Array, "M 2F"],
    scale: Float[Array, "M"],
    h: Float[Array, "M R"] | None = None,
    b: Float[Array, "2F R"] | None = None,
    *,
    dtype: jax.typing.DTypeLike,
    activation: Activation,
    ranks: object = None,
    index: None = None,
) -> Float[Array, "M F"]:
    return glu.forward(finished(sums, scale, h, b, dtype), activation=activation, room=0)


def backward(
    sums: Float[Array, "M 2F"],
    scale: Float[Array, "M"],
    h: Float[Array, "M R"] | None,
    b: Float[Array, "2F R"] | None,
    d_sums: Float[Array, "M F"],
    d_scale: Float[Array, "M"],
    dh: Float[Array, "M S"] | None = None,
    d_b: Float[Array, "F S"] | None = None,
    *,
    dtype: jax.typing.DTypeLike,
    activation: Activation,
    ranks: object = None,
    index: None = None,
) -> tuple[Float[Array, "M 2F"], Float[Array, "M F"]]:
    gate_up, d_act = finished(sums, scale, h, b, dtype), finished(d_sums, d_scale, dh, d_b, dtype)
    return glu.backward(gate_up, d_act, activation=activation, room=0, with_act=True)


def finished(sums, scale, h, b, dtype) -> Float[Array, "M N"]:
    """sums * scale + h b^T in float32, rounded once."""
    if h is None:
        return (sums.astype(jnp.float32) * scale[:, None]).astype(dtype)
    return rescale_add(sums, scale, h, b)
