"""Adam with 8-bit moments: one step for the parameters of a leaf, in blocks of 256 that share a scale."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.adamw_8bit import reference
from fastft_jax.pallas_kernels.adamw_8bit.codes import BLOCK, decode, encode
from fastft_jax.pallas_kernels.adamw_8bit.reference import Moment, adam

Implementation = Literal["xla", "triton"]

__all__ = ["BLOCK", "Implementation", "Moment", "adam", "adam_8bit", "decode", "encode"]


def adam_8bit(
    grad: Float[Array, "G 256"],
    m: Moment,
    v: Moment,
    correction1: Float[Array, ""],
    correction2: Float[Array, ""],
    *,
    b1: float,
    b2: float,
    eps: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "G 256"], Moment, Moment]:
    """m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, update = m / (sqrt(v) / correction2 + eps) / correction1.

    For G blocks of 256 parameters: grad [G, 256] of any float dtype, m and v uint8 codes [G, 256] with float32 absmax
    [G] (`encode`, m signed and v not); correction1 = 1 - b1^t and correction2 = sqrt(1 - b2^t), float32. The update,
    float32 [G, 256], comes from the exact moments, before they are stored in 8 bits. It holds neither weight decay
    nor learning rate, so that the rest of an optimizer stays as it is.

    `None` picks "triton" on a GPU, "xla" elsewhere or above the kernel's 2 GiB of codes. Raises ValueError for shapes,
    dtypes or names that do not fit.
    Source: 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861); bitsandbytes 0.50, AdamW8bit on a CPU.
    """
    groups = grad.shape[0]
    for moment in (m, v):
        wanted = (groups, BLOCK), jnp.uint8, (groups,)
        if grad.ndim != 2 or (moment.codes.shape, moment.codes.dtype, moment.absmax.shape) != wanted:
            raise ValueError(
                f"grad {grad.shape} needs uint8 codes of its shape [G, 256] and absmax [G], "
                f"got {moment.codes.dtype}{moment.codes.shape} and {moment.absmax.shape}"
            )
    if implementation is None:
        implementation = "triton" if pallas.on_gpu() and grad.size < 2**31 else "xla"
    args = (grad, m, v, correction1, correction2)
    if implementation == "xla":
        return reference.adam_8bit(*args, b1=b1, b2=b2, eps=eps)
    if implementation == "triton":
        from fastft_jax.pallas_kernels.adamw_8bit import triton

        return triton.adam_8bit(*args, b1=b1, b2=b2, eps=eps)
    raise ValueError(f"unknown 8-bit Adam implementation {implementation!r}: use None, 'xla' or 'triton'")
