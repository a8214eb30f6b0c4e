"""One step of Adam on 8-bit moments in plain jnp: what runs on a CPU, and what the kernel is compared with."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from fastft_jax.pallas_kernels.adamw_8bit.codes import decode, encode


class Moment(NamedTuple):
    """A moment in blocks of 256: here G blocks; an optimizer may keep its codes and absmax in another shape."""

    codes: UInt8[Array, "G 256"]
    absmax: Float[Array, "G"]


def adam(
    grad: Float[Array, "..."],
    m: Float[Array, "..."],
    v: Float[Array, "..."],
    correction1: Float[Array, ""],
    correction2: Float[Array, ""],
    *,
    b1: float,
    b2: float,
    eps: float,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """(update, m, v) in float32: m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2,
    update = m / (sqrt(v) / correction2 + eps) / correction1."""
    g = grad.astype(jnp.float32)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    return (m / (jnp.sqrt(v) / correction2 + eps)) / correction1, m, v


def adam_8bit(
    grad: Float[Array, "G 256"],
    m: Moment,
    v: Moment,
    correction1: Float[Array, ""],
    correction2: Float[Array, ""],
    *,
    b1: float,
    b2: float,
    eps: float,
) -> tuple[Float[Array, "G 256"], Moment, Moment]:
    """(update, m, v): the update is taken from the exact moments, which are then stored in 8 bits."""
    numbers = dict(b1=b1, b2=b2, eps=eps)
    update, exact_m, exact_v = adam(grad, decode(*m, True), decode(*v, False), correction1, correction2, **numbers)
    return update, Moment(*encode(exact_m, True)), Moment(*encode(exact_v, False))
