"""Decode, then multiply: the plain-jnp meaning of the op, and what runs for many rows or off a GPU."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from fastft_jax.pallas_kernels.nf4 import reference as nf4


def quantised_matmul(
    x: Float[Array, "M K"],
    codes: UInt8[Array, "L G 32"],
    absmax: Float[Array, "L G"] | UInt8[Array, "L G"],
    absmax_scale: Float[Array, "L S"] | None,
    absmax_offset: Float[Array, "L"] | None,
    layer: Int[Array, ""] | int = 0,
    *,
    shape: tuple[int, int],
) -> Float[Array, "M N"]:
    """The weight is rounded to x.dtype; float32 stays float32 (a GPU's default would round the factors to TF32)."""
    n, k = shape
    stacked = (codes, absmax, absmax_scale, absmax_offset)
    one = [None if a is None else lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in stacked]
    w = nf4.dequantize(*one, x.dtype).reshape(-1)[: n * k].reshape(shape)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("MK,NK->MN", x, w, precision=precision, preferred_element_type=x.dtype)
