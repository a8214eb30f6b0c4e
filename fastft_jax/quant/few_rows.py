"""Products of a few rows, as in decoding, with NF4 weights that are never written out in full."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.quantised_matmul import quantised_matmul, supported
from fastft_jax.quant.nf4 import NF4Array


def few_row_product(x: Float[Array, "M K"], weights: Sequence[NF4Array | Array]) -> Float[Array, "M N"] | None:
    """[x W_1^T, .., x W_G^T] where the few-row kernel takes all of it (on a GPU, up to 64 rows), else None."""
    if not pallas.on_gpu() or not all(isinstance(w, NF4Array) and _supported(x, w, 1) for w in weights):
        return None
    weights = [w if w.layer is None or _supported(x, w) else w.sliced() for w in weights]
    parts = [
        quantised_matmul(x, w.codes, w.absmax, w.absmax_scale, w.absmax_offset, shape=w.shape, layer=w.layer)
        for w in weights
    ]
    return jnp.concatenate(parts, axis=1)


def _supported(x: Float[Array, "M K"], w: NF4Array, layers: int | None = None) -> bool:
    return supported(x.shape[0], w.shape, x.dtype, w.codes.shape[0] if layers is None else layers)
