"""Grouped products as `lax.ragged_dot_general`.

What a CPU runs, and what the kernels are compared with. XLA has no grouped product: it multiplies every row with every
group's matrix, against zeros, which is E times the work.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def matmul(
    x: Float[Array, "M K"], w: Float[Array, "E N K"], sizes: Int[Array, "E"], dtype: jax.typing.DTypeLike
) -> Float[Array, "M N"]:
    return _ragged(x, w, sizes, ((1,), (2,)), (0,), dtype)


def transposed(
    y: Float[Array, "M N"], w: Float[Array, "E N K"], sizes: Int[Array, "E"], dtype: jax.typing.DTypeLike
) -> Float[Array, "M K"]:
    return _ragged(y, w, sizes, ((1,), (1,)), (0,), dtype)


def outer(
    y: Float[Array, "M N"], x: Float[Array, "M K"], sizes: Int[Array, "E"], dtype: jax.typing.DTypeLike
) -> Float[Array, "E N K"]:
    return _ragged(y, x, sizes, ((0,), (0,)), (), dtype)


def _ragged(lhs, rhs, sizes, contracting, groups, dtype) -> Array:
    dimensions = lax.RaggedDotDimensionNumbers((contracting, ((), ())), (0,), groups)
    precision = lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    return lax.ragged_dot_general(lhs, rhs, sizes, dimensions, precision=precision, preferred_element_type=dtype)
