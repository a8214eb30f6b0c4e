"""DoRA: the adapted weight's rows keep a trained length of their own, as PEFT computes it.

W' = m (W + s B A) / ||W + s B A||, row by row of W [N, K]; the norm is a constant to the gradient (section 4.3).
Source: Liu et al. 2024, arXiv:2402.09353.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastft_jax.quant.dense import Quantised, dense, is_quantised
from fastft_jax.quant.lora_linear import contract


def row_norms(
    weight: Float[Array, "N K"] | Quantised, a: Float[Array, "R K"], b: Float[Array, "N R"]
) -> Float[Array, "N"]:
    """||W + B A|| of each row, in float32; b holds the scaling. Decodes W, so it costs a pass over it."""
    return jnp.sqrt(jnp.sum(jnp.square(dense(weight, jnp.float32) + contract(b, a, 1, 0, jnp.float32)), axis=1))


def column_factor(
    weight: Float[Array, "N K"] | Quantised,
    a: Float[Array, "R K"],
    b: Float[Array, "N R"],
    magnitude: Float[Array, "N"],
) -> Float[Array, "N"]:
    """m / ||W + B A||: what multiplies the columns of the output."""
    return magnitude / row_norms(weight, *lax.stop_gradient((a, b)))


@jax.jit
def stacked_row_norms(
    weight: Float[Array, "L N K"] | Quantised,
    rows: Float[Array, "r"],
    a: Float[Array, "r R K"],
    b: Float[Array, "r N R"],
) -> Float[Array, "r N"]:
    """`row_norms` of the rows of a stack that are adapted: the magnitudes that an adapter starts with."""

    def one(at):
        row, a, b = at
        return row_norms(weight.at(row) if is_quantised(weight) else weight[row], a, b)

    return lax.map(one, (rows, a, b))
