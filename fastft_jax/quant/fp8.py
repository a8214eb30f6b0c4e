"""Products of NF4 weights in fp8: what a frozen base's large GEMMs become when its weights say `compute="fp8"`.

y = (x8 w8^T) s_x s_w: x in e4m3 with one scale a row (a token), W decoded to e4m3 with one scale for all the matrices
that share a product. One is enough: e4m3 spans 448 / 2**-9, its precision is the same over all of 448 .. 2**-6, and the
blocks of one matrix differ in size by a factor of ten, not of thousands. Gradients are quantised as activations are:
dX = (dY8 W8) s_dy s_w, with W8 decoded once more, transposed, because fp8 tensor cores contract rows only.
The scales are multiplied in float32, in the pass that adds the adapter's part, which is not quantised.
Source: FP8 Formats for Deep Learning (arXiv 2209.05433).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels import fp8, nf4, pallas
from fastft_jax.pallas_kernels.fp8 import Scaled
from fastft_jax.pallas_kernels.quantised_matmul import MAX_ROWS
from fastft_jax.quant.nf4 import BLOCK, NF4Array, dequantize

DTYPE = fp8.DTYPES["e4m3"]
LowRank = tuple[Float[Array, "rows R"], Float[Array, "columns R"]]


def chosen(weights: Sequence[Array | NF4Array]) -> bool:
    """Whether the product with these weights side by side runs in fp8: all of them must say so."""
    return all(isinstance(w, NF4Array) and w.compute == "fp8" for w in weights)


def takes(rows: int, weights: Sequence[Array | NF4Array]) -> bool:
    """Whether so many rows are quantised for this product: a GPU multiplies a few by the NF4 codes as they are."""
    return chosen(weights) and not (pallas.on_gpu() and rows <= MAX_ROWS)


def product(
    x: Float[Array, "M any"], weights: Sequence[NF4Array], low_rank: LowRank | None = None
) -> Float[Array, "M N"]:
    """x [W_1; ..; W_G]^T + h b^T, of x's first K columns, in x.dtype; low_rank: h [M, R] and b [N, R]."""
    x8, scale = fp8.quantise_rows(x, columns=weights[0].shape[1])
    return finished(product_of_rows(x8, scale, weights, x.dtype), low_rank, x.dtype)


def gradient(
    dy: Float[Array, "M N"], weights: Sequence[NF4Array], low_rank: LowRank | None = None
) -> Float[Array, "M K"]:
    """dY [W_1; ..; W_G] + h b^T, in dY.dtype; low_rank: h [M, R] and b [K, R]."""
    return finished(scaled_gradient(dy, weights), low_rank, dy.dtype)


def product_of_rows(
    x8: Float[Array, "M K"], row_scales: Float[Array, "M"], weights: Sequence[NF4Array], dtype: jax.typing.DTypeLike
) -> Scaled:
    """The product of rows that are in e4m3 already, as sums and scales: for who finishes it on the way."""
    n, k = sum(w.shape[0] for w in weights), weights[0].shape[1]
    scale, factor = _scales(weights)
    if _by_kernel(weights):
        w8, row = None, 0
        for w in weights:
            w8 = nf4.decode_into(w8, *w.in_stack(), factor, shape=w.shape, size=(n, k), row=row, dtype=DTYPE)
            row += w.shape[0]
    else:
        w8 = jnp.concatenate([dequantize(w, DTYPE, factor) for w in weights])
    return Scaled(_sums(x8, w8, dtype), row_scales * scale)


def scaled_gradient(dy: Float[Array, "M N"], weights: Sequence[NF4Array]) -> Scaled:
    """dY [W_1; ..; W_G] as sums and scales."""
    n = sum(w.shape[0] for w in weights)
    scale, factor = _scales(weights)
    if _by_kernel(weights):
        w8, column = None, 0
        for w in weights:
            place = dict(shape=w.shape, width=n, column=column, dtype=DTYPE)
            w8 = nf4.decode_transposed_into(w8, *w.in_stack(), factor, **place)
            column += w.shape[0]
    else:
        w8 = jnp.concatenate([dequantize(w, DTYPE, factor) for w in weights]).T
    dy8, row_scales = fp8.quantise_rows(dy)
    return Scaled(_sums(dy8, w8, dy.dtype), row_scales * scale)


def finished(product: Scaled, low_rank: LowRank | None, dtype: jax.typing.DTypeLike) -> Float[Array, "M N"]:
    """sums * scale + h b^T in `dtype`, that of h and b."""
    if low_rank is None:
        return (product.sums.astype(jnp.float32) * product.scale[:, None]).astype(dtype)
    return fp8.rescale_add(product.sums, product.scale, *low_rank)


def _sums(x8, w8, dtype):
    # A float32 result would cost as many bytes again; float16 does not reach to 448**2 K.
    return fp8.matmul(x8, w8, jnp.float32 if dtype == jnp.float32 else jnp.bfloat16)


def _scales(weights: Sequence[NF4Array]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(scale, factor): the weights times `factor` fill e4m3's range; e4m3 times `scale` gives them back."""
    return fp8.scales(jnp.max(jnp.stack([_absmax(w) for w in weights])), fp8.LARGEST["e4m3"])


def _absmax(w: NF4Array) -> Float[Array, ""]:
    """The largest magnitude, or a little more: from the scales of the double-quantised absmax, 1 / 256 of its size.

    A block of absmax values is within its scale of the offset, and that is reached above it, as a rule.
    """
    here = lambda leaf: leaf if w.layer is None else leaf[w.layer]  # noqa: E731
    if w.absmax_scale is None:
        return jnp.max(here(w.absmax))
    return jnp.max(here(w.absmax_scale)) + here(w.absmax_offset)


def _by_kernel(weights: Sequence[NF4Array]) -> bool:
    """Whether the NF4 kernels can write these weights straight into one buffer."""
    return all(w.shape[1] % BLOCK == 0 and nf4.kernel_takes(w.codes) for w in weights)
