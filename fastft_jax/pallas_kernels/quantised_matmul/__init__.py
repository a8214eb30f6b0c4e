"""Few rows times an NF4 matrix: y[m, n] = sum_k x[m, k] w[n, k], decoded on the fly and never written to memory.

Generating text multiplies 1 to 64 rows at a time, so a product costs what reading its weight costs: 0.52 bytes a
weight here against 0.5 + 2 + 2 for decoding it first. The layout is the one of `pallas_kernels.nf4`. Source: QLoRA
(arXiv 2305.14314) for the format; the kernels are described in their modules.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.quantised_matmul import reference
from fastft_jax.pallas_kernels.quantised_matmul.tiles import MAX_ROWS, supported

Implementation = Literal["xla", "triton", "jax_triton"]

__all__ = ["MAX_ROWS", "Implementation", "quantised_matmul", "supported"]


def quantised_matmul(
    x: Float[Array, "M K"],
    codes: UInt8[Array, "*L G 32"],
    absmax: Float[Array, "*L G"] | UInt8[Array, "*L G"],
    absmax_scale: Float[Array, "*L S"] | None = None,
    absmax_offset: Float[Array, "*L"] | None = None,
    *,
    shape: tuple[int, int],
    layer: Int[Array, ""] | int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """x W^T in x.dtype with float32 accumulation, for W [N, K] = `shape` of G = N K / 64 NF4 blocks.

    With `layer`, an index that may be traced, the four arrays are stacks [L, ...] of which that matrix is read where it
    lies: a loop over layers that slices the stack instead copies the codes before every product.

    absmax is float32 [G], or uint8 with a float32 scale [ceil(G / 256)] and offset [] (see `nf4.dequantize`). "triton"
    and "jax_triton" take 1 to 64 rows of bfloat16 or float16 and K a multiple of 64: up to 4 rows multiply integers, of
    which a weight's are right to 1.5e-4 and x's to 3e-5 of the largest in 32, more rows round the weight to x.dtype as
    "xla" does. "jax_triton" runs on a GPU only and needs that package. `None` picks "triton" on a GPU where it applies,
    else "xla". Not differentiable in the kernels: for inference. Raises ValueError for shapes, dtypes or names that do
    not fit, ImportError when jax-triton is not installed.
    """
    n, k = shape
    groups = -(-n * k // 64)
    lead = () if layer is None else codes.shape[:1]
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"cannot multiply x of shape {x.shape} with the transpose of a weight of shape {shape}")
    if codes.shape != (*lead, groups, 32) or codes.dtype != "uint8" or absmax.shape != (*lead, groups):
        raise ValueError(
            f"an NF4 weight of shape {shape} has uint8 codes [{groups}, 32] and absmax [{groups}], "
            f"got {codes.dtype}{codes.shape} and {absmax.shape}"
        )
    double = absmax.dtype == "uint8"
    if double != (absmax_scale is not None) or double != (absmax_offset is not None):
        raise ValueError(f"a uint8 absmax comes with a scale and an offset, a float32 one without; got {absmax.dtype}")
    if double and absmax_scale.shape != (*lead, -(-groups // 256)):
        raise ValueError(f"{groups} blocks need {-(-groups // 256)} absmax scales, got {absmax_scale.shape}")
    applies = supported(x.shape[0], shape, x.dtype, *lead)
    if implementation is None:
        implementation = "triton" if pallas.on_gpu() and applies else "xla"
    if implementation not in ("xla", "triton", "jax_triton"):
        raise ValueError(
            f"unknown quantised_matmul implementation {implementation!r}: use None, 'xla', 'triton' or 'jax_triton'"
        )
    weight = [codes, absmax, absmax_scale, absmax_offset]
    if layer is None:
        weight, layer = [None if a is None else jnp.asarray(a)[None] for a in weight], 0
    if implementation == "xla":
        return reference.quantised_matmul(x, *weight, layer, shape=shape)
    if not applies:
        raise ValueError(
            f"the {implementation} kernels take 1 to {MAX_ROWS} rows of bfloat16 or float16, K a multiple of 64 and "
            f"less than 2 GiB of codes; got {x.dtype}{x.shape} and a weight of shape {shape}"
        )
    if implementation == "triton":
        from fastft_jax.pallas_kernels.quantised_matmul import triton

        return triton.quantised_matmul(x, *weight, layer, shape=shape)
    from fastft_jax.pallas_kernels.quantised_matmul import jax_triton

    return jax_triton.quantised_matmul(x, *weight, layer, shape=shape)
