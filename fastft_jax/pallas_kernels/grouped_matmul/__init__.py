"""Products of sorted rows with one matrix a group: y[m] = x[m] W[e]^T for the rows m of group e, and two transposes.

Rows lie group after group, `sizes` [E] of them each; they sum to M, and a group may be empty. Every row is multiplied
with its own group's matrix. float32 means float32 (a GPU's default would round the factors to TF32); 16-bit products
are accumulated in float32. No derivative: callers write theirs. `implementation` None picks "triton" on a GPU, "xla"
elsewhere. Raises ValueError for shapes and names that do not fit. Source: MegaBlocks (Gale et al. 2022,
arXiv:2211.15841), without its padding of groups.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.grouped_matmul import reference

Implementation = Literal["xla", "triton"]

__all__ = ["Implementation", "grouped_matmul", "grouped_matmul_transposed", "grouped_outer"]


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E N K"],
    sizes: Int[Array, "E"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """x[m] W[e]^T, in x's dtype."""
    _check(w.shape == (*sizes.shape, w.shape[1], x.shape[1]), x, w, sizes)
    return _kernels(implementation).matmul(x, w, sizes, x.dtype)


def grouped_matmul_transposed(
    y: Float[Array, "M N"],
    w: Float[Array, "E N K"],
    sizes: Int[Array, "E"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M K"]:
    """y[m] W[e], in y's dtype."""
    _check(w.shape == (*sizes.shape, y.shape[1], w.shape[2]), y, w, sizes)
    return _kernels(implementation).transposed(y, w, sizes, y.dtype)


def grouped_outer(
    y: Float[Array, "M N"],
    x: Float[Array, "M K"],
    sizes: Int[Array, "E"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "E N K"]:
    """The sum of y[m] x[m]^T over the rows of each group, in float32; zero for a group without rows."""
    _check(x.shape[0] == y.shape[0], y, x, sizes)
    return _kernels(implementation).outer(y, x, sizes, jnp.float32)


def _check(fits: bool, lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> None:
    if not fits:
        raise ValueError(f"{lhs.shape} and {rhs.shape} do not fit together in {sizes.shape[0]} groups")


def _kernels(implementation: Implementation | None):
    if implementation is None:
        implementation = "triton" if pallas.on_gpu() else "xla"
    if implementation == "xla":
        return reference
    if implementation == "triton":
        from fastft_jax.pallas_kernels.grouped_matmul import triton

        return triton
    raise ValueError(f"unknown grouped_matmul implementation {implementation!r}: use None, 'xla' or 'triton'")
