"""8-bit floating point: rows of activations scaled to the format's range, and products of such rows.

x8 = round(x / s), s = max |x| / largest, one float32 scale a row. Formats: "e4m3" (3 bits of fraction, up to 448) and
"e5m2" (2 bits, up to 57344); finite, rounded to the nearest even. Source: FP8 Formats for Deep Learning
(arXiv 2209.05433).
"""

from typing import Literal

from jaxtyping import Array, Float

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.fp8 import reference
from fastft_jax.pallas_kernels.fp8.glu import Scaled, rescale_glu, rescale_glu_backward
from fastft_jax.pallas_kernels.fp8.matmul import matmul
from fastft_jax.pallas_kernels.fp8.norm import rms_norm_rows
from fastft_jax.pallas_kernels.fp8.reference import DTYPES, LARGEST, Format, scales

Implementation = Literal["xla", "triton"]

__all__ = [
    "DTYPES",
    "LARGEST",
    "Format",
    "Implementation",
    "Scaled",
    "matmul",
    "quantise_rows",
    "rescale_add",
    "rescale_glu",
    "rescale_glu_backward",
    "rms_norm_rows",
    "scales",
]


def quantise_rows(
    x: Float[Array, "M any"],
    *,
    columns: int | None = None,
    format: Format = "e4m3",
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "M K"], Float[Array, "M"]]:
    """The first K = `columns` columns of x (all, if None) in 8 bits, and the float32 scale of each row.

    x is bfloat16, float16 or float32. A row of zeros (and one below 2**-100, which counts as zeros) has scale 1; a row
    with an infinity or a NaN gives NaN. Not differentiable. `None` picks "triton" on a GPU, "xla" elsewhere.
    Raises ValueError for shapes and names that do not fit.
    """
    if x.ndim != 2 or not 0 < (columns or x.shape[1]) <= x.shape[1]:
        raise ValueError(f"cannot take {columns} columns of an array of shape {x.shape}")
    if format not in DTYPES:
        raise ValueError(f"unknown 8-bit format {format!r}: use one of {', '.join(DTYPES)}")
    columns = columns or x.shape[1]
    return _kernels(implementation).quantise_rows(x, columns, format)


def rescale_add(
    sums: Float[Array, "M N"],
    scale: Float[Array, "M"],
    h: Float[Array, "M R"],
    b: Float[Array, "N R"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """sums[m, n] * scale[m] + (h b^T)[m, n]: a scaled product and a low-rank one, added in float32; in h.dtype.

    One pass over `sums` (bfloat16 or float32), in its place where the dtypes agree. scale is float32; h and b are of
    one dtype, R a multiple of 64. Not differentiable. `None` picks "triton" on a GPU for 16-bit h and b, else "xla".
    Raises ValueError for shapes, dtypes and names that do not fit.
    """
    (m, n), r = sums.shape, h.shape[1]
    if scale.shape != (m,) or h.shape != (m, r) or b.shape != (n, r) or r % 64 or h.dtype != b.dtype:
        raise ValueError(
            f"cannot add {h.dtype}{h.shape} times {b.dtype}{b.shape} to {sums.shape} scaled by {scale.shape}"
        )
    if implementation is None and h.dtype.itemsize > 2:
        implementation = "xla"
    return _kernels(implementation).rescale_add(sums, scale, h, b)


def _kernels(implementation: Implementation | None):
    if implementation not in (None, "xla", "triton"):
        raise ValueError(f"unknown fp8 implementation {implementation!r}: use None, 'xla' or 'triton'")
    if implementation == "xla" or (implementation is None and not pallas.on_gpu()):
        return reference
    from fastft_jax.pallas_kernels.fp8 import triton

    return triton
