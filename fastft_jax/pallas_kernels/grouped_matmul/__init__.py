"""Products of sorted rows with one matrix a group: y[m] = x[m] W[e]^T for the rows m of group e, and two transposes.

Rows lie group after group, `sizes` [E] of them each; they sum to M, and a group may be empty. Every row is multiplied
with its own group's matrix. float32 means float32 (a GPU's default would round the factors to TF32); 16-bit products
are accumulated in float32. `low_rank` is a second pair of factors whose product joins the sum in its accumulator: an
adapter's. No derivative: callers write theirs. `implementation` None picks "triton" on a GPU, "xla"
elsewhere. Raises ValueError for shapes and names that do not fit. Source: MegaBlocks (Gale et al. 2022,
arXiv:2211.15841), without its padding of groups.
"""

from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.grouped_matmul import reference

Implementation = Literal["xla", "triton"]

__all__ = ["Implementation", "grouped_matmul", "grouped_matmul_transposed", "grouped_outer"]


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E N K"],
    sizes: Int[Array, "E"],
    low_rank: tuple[Float[Array, "M R"], Float[Array, "E N R"]] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """x[m] W[e]^T, or x[m] W[e]^T + h[m] B[e]^T with low_rank (h, B), in x's dtype."""
    for lhs, rhs in ((x, w), *([] if low_rank is None else [low_rank])):
        _check(rhs.shape == (*sizes.shape, w.shape[1], lhs.shape[1]) and len(lhs) == len(x), lhs, rhs, sizes)
    return _kernels(implementation).matmul(x, w, sizes, low_rank)


def grouped_matmul_transposed(
    y: Float[Array, "M N"],
    w: Float[Array, "E N K"],
    sizes: Int[Array, "E"],
    low_rank: tuple[Float[Array, "M R"], Float[Array, "E R K"]] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M K"]:
    """y[m] W[e], or y[m] W[e] + h[m] A[e] with low_rank (h, A), in y's dtype."""
    for lhs, rhs in ((y, w), *([] if low_rank is None else [low_rank])):
        _check(rhs.shape == (*sizes.shape, lhs.shape[1], w.shape[2]) and len(lhs) == len(y), lhs, rhs, sizes)
    return _kernels(implementation).transposed(y, w, sizes, low_rank)


def grouped_outer(
    y: Float[Array, "M N"],
    x: Float[Array, "M K"],
    sizes: Int[Array, "E"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "E N K"]:
    """The sum of y[m] x[m]^T over the rows of each group, in float32; zero for a group without rows."""
    _check(x.shape[0] == y.shape[0], y, x, sizes)
    return _kernels(implementation).outer(y, x, sizes)


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
