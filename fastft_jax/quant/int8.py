"""Int8 weights: a byte an element with one scale an output channel, and the outlying input columns in 16 bits.

A row's scale is its largest magnitude over 127, so a single large element costs all others of the row their precision.
Large elements of a trained model stand together in a few input columns (its outlier features); those columns are kept
as they were, and the scales are those of the rest. Source: LLM.int8() (arXiv 2208.07339), of the weights alone:
activations stay as they are.
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

COLUMNS_AN_OUTLIER = 128  # one column in so many is kept in 16 bits: 1.6% more bytes

__all__ = ["Int8Array", "dequantize", "quantize"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Array:
    """A matrix W [N, K] (or a stack of L) as a pytree; `shape` is that of one matrix.

    W[n, k] = codes[n, k] * scale[n], but W[:, columns] = outliers.
    """

    codes: Int8[Array, "*lead N K"]  # zero in the outlying columns
    scale: Float[Array, "*lead N"]  # float32
    outliers: Float[Array, "*lead N O"]  # O = ceil(K / 128), in the dtype that was encoded; 0 in bitsandbytes's own
    columns: Int[Array, "*lead O"]  # ascending
    shape: tuple[int, ...] = field(metadata={"static": True})

    def at(self, layer: Int[Array, ""]) -> "Int8Array":
        """One matrix of a stack, by an index that may be traced."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), self)

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def quantize(w: Float[Array, "N K"]) -> Int8Array:
    """Encode a float32, bfloat16 or float16 matrix on its device; jit-able.

    Outlying are the columns with the largest element relative to the root mean square of its row.
    """
    if w.ndim != 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"int8 encodes a matrix of floats, got {w.dtype}{list(w.shape)}")
    x = w.astype(jnp.float32)
    rms = jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True))
    sizes = jnp.max(jnp.abs(x) / jnp.where(rms > 0, rms, 1), axis=0)
    columns = jnp.sort(jax.lax.top_k(sizes, math.ceil(w.shape[1] / COLUMNS_AN_OUTLIER))[1])
    rest = x.at[:, columns].set(0)
    scale = jnp.max(jnp.abs(rest), axis=1) / 127
    codes = jnp.round(rest / jnp.where(scale > 0, scale, 1)[:, None]).astype(jnp.int8)
    return Int8Array(codes, scale, w[:, columns], columns, w.shape)


def dequantize(q: Int8Array, dtype: jax.typing.DTypeLike) -> Float[Array, "N K"]:
    """code * scale in float32, then one cast to `dtype`; one matrix."""
    w = (q.codes.astype(jnp.float32) * q.scale[:, None]).astype(dtype)
    if not q.columns.size:
        return w
    return w.at[:, q.columns].set(q.outliers.astype(dtype), indices_are_sorted=True, unique_indices=True)
