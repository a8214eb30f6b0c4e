"""The product of two 8-bit matrices whose rows lie along the contracted axis: the one layout fp8 tensor cores take."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels import pallas


def matmul(
    x8: Float[Array, "M K"], w8: Float[Array, "N K"], dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> Float[Array, "M N"]:
    """x8 w8^T in `dtype`, without scales: they are the caller's to multiply, in the pass that reads the result.

    On a GPU (compute capability 8.9 or more) this is cuBLASLt's fp8 kernel, with its fast accumulation: partial sums
    keep about 14 bits inside the tensor core. Elsewhere the exact float32 product, rounded once.
    """
    dimensions = (((1,), (1,)), ((), ()))
    if not pallas.on_gpu():
        x, w = x8.astype(jnp.float32), w8.astype(jnp.float32)
        return lax.dot_general(x, w, dimensions, lax.Precision.HIGHEST).astype(dtype)
    # Naming the algorithm does not only say what is wanted. A plain fp8 dot goes through XLA's search over its own
    # Triton kernels, which compiles for 10 to 90 seconds a shape and then picks cuBLASLt; those do not offer this one.
    algorithm = lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM
    return lax.dot_general(x8, w8, dimensions, algorithm, preferred_element_type=dtype)
