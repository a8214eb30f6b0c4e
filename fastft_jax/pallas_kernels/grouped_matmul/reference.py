"""Grouped products as `lax.ragged_dot_general`.

What a CPU runs, and what the kernels are compared with. XLA has no grouped product: it multiplies every row with every
group's matrix, against zeros, which is E times the work.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E N K"],
    sizes: Int[Array, "E"],
    low_rank: tuple[Array, Array] | None = None,
) -> Float[Array, "M N"]:
    return _sum(x, w, sizes, low_rank, ((1,), (2,)))


def transposed(
    y: Float[Array, "M N"],
    w: Float[Array, "E N K"],
    sizes: Int[Array, "E"],
    low_rank: tuple[Array, Array] | None = None,
) -> Float[Array, "M K"]:
    return _sum(y, w, sizes, low_rank, ((1,), (1,)))


def outer(y: Float[Array, "M N"], x: Float[Array, "M K"], sizes: Int[Array, "E"]) -> Float[Array, "E N K"]:
    return _ragged(y, x, sizes, ((0,), (0,)), ())


def _sum(lhs, rhs, sizes, low_rank, contracting) -> Array:
    total = _ragged(lhs, rhs, sizes, contracting, (0,))
    if low_rank is not None:
        total = total + _ragged(*low_rank, sizes, contracting, (0,))
    return total.astype(lhs.dtype)


def _ragged(lhs, rhs, sizes, contracting, groups) -> Array:
    dimensions = lax.RaggedDotDimensionNumbers((contracting, ((), ())), (0,), groups)
    precision = lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    return lax.ragged_dot_general(lhs, rhs, sizes, dimensions, precision=precision, preferred_element_type=jnp.float32)
