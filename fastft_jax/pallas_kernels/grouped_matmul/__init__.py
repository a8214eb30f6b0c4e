"""Products of sorted rows with one matrix a group: y[m] = x[m] W[e]^T for the rows m of group e, and two transposes.

Rows lie group after group, `sizes` [E] of them each; every row is multiplied with its own group's matrix. All three are
`lax.ragged_dot_general`. float32 means float32 (a GPU's default would round the factors to TF32); 16-bit products are
accumulated in float32. The op as in MegaBlocks (Gale et al. 2022, arXiv:2211.15841), without padding of groups.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

__all__ = ["grouped_matmul", "grouped_matmul_transposed", "grouped_outer"]


def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "E N K"], sizes: Int[Array, "E"], dtype: jax.typing.DTypeLike = None
) -> Float[Array, "M N"]:
    """x[m] W[e]^T, in `dtype` (x's by default)."""
    return _ragged(x, w, sizes, ((1,), (2,)), (0,), dtype)


def grouped_matmul_transposed(
    y: Float[Array, "M N"], w: Float[Array, "E N K"], sizes: Int[Array, "E"], dtype: jax.typing.DTypeLike = None
) -> Float[Array, "M K"]:
    """y[m] W[e], in `dtype` (y's by default)."""
    return _ragged(y, w, sizes, ((1,), (1,)), (0,), dtype)


def grouped_outer(
    y: Float[Array, "M N"], x: Float[Array, "M K"], sizes: Int[Array, "E"], dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "E N K"]:
    """The sum of y[m] x[m]^T over the rows of each group; zero for a group without rows."""
    return _ragged(y, x, sizes, ((0,), (0,)), (), dtype)


def _ragged(lhs, rhs, sizes, contracting, groups, dtype) -> Array:
    dimensions = lax.RaggedDotDimensionNumbers((contracting, ((), ())), (0,), groups)
    precision = lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    return lax.ragged_dot_general(
        lhs, rhs, sizes, dimensions, precision=precision, preferred_element_type=dtype or lhs.dtype
    )
