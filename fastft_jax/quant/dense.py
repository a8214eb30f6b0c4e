"""What the quantised arrays have in common: `shape` of one matrix, `at(layer)` of a stack, and a dense matrix."""

import jax
from jaxtyping import Array, Float

from fastft_jax.quant import int8, nf4
from fastft_jax.quant.int8 import Int8Array
from fastft_jax.quant.nf4 import NF4Array

Quantised = NF4Array | Int8Array


def is_quantised(leaf: object) -> bool:
    """Whether a leaf of a decoder is a quantised array and not a plain one."""
    return isinstance(leaf, Quantised)


def dense(w: Float[Array, "N K"] | Quantised, dtype: jax.typing.DTypeLike) -> Float[Array, "N K"]:
    """One matrix in `dtype`, however it is stored."""
    if isinstance(w, NF4Array):
        return nf4.dequantize(w, dtype)
    return int8.dequantize(w, dtype) if isinstance(w, Int8Array) else w.astype(dtype)
