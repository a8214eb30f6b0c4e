"""Scaling rows to an 8-bit floating-point format and back, in plain jnp."""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Format = Literal["e4m3", "e5m2"]
DTYPES = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
"""The largest finite value of each format; what is scaled never rounds beyond it."""
LEAST = 2.0**-100
"""Largest magnitudes below this count as zero: LARGEST / LEAST is still a float32."""


def scales(absmax: Float[Array, "..."], largest: float) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(scale, factor): values up to absmax times `factor` fill the format; times `scale`, they are back. float32."""
    absmax = jnp.where(absmax < LEAST, largest, absmax)  # a NaN stays one
    return absmax * (1.0 / largest), largest / absmax


def quantise_rows(
    x: Float[Array, "M any"], columns: int, format: Format
) -> tuple[Float[Array, "M K"], Float[Array, "M"]]:
    """Each row by its own largest magnitude."""
    x = x[:, :columns].astype(jnp.float32)
    scale, factor = scales(jnp.max(jnp.abs(x), axis=1), LARGEST[format])
    return (x * factor[:, None]).astype(DTYPES[format]), scale


def rescale_add(
    sums: Float[Array, "M N"], scale: Float[Array, "M"], h: Float[Array, "M R"], b: Float[Array, "N R"]
) -> Float[Array, "M N"]:
    """Two terms in float32, one rounding."""
    precision = lax.Precision.HIGHEST if h.dtype == jnp.float32 else None
    low_rank = lax.dot_general(h, b, (((1,), (1,)), ((), ())), precision, preferred_element_type=jnp.float32)
    return (sums.astype(jnp.float32) * scale[:, None] + low_rank).astype(h.dtype)
