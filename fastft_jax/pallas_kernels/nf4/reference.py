"""NF4 decoding in plain jnp: what runs on a CPU, and what the kernel must equal bit for bit."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from fastft_jax.pallas_kernels.nf4.codebooks import NF4_CODE, dynamic_map

MAX_CODE_BYTES = 2**31
GROUPS_PER_SCALE = 256
"""Blocks of 64 weights that share one scale of a double-quantised absmax."""


def in_reach(code_bytes: int) -> bool:
    """Whether a kernel can address so many bytes of codes: Pallas's offsets, counted in elements, are 32-bit and signed
    for arrays up to 4 GiB and 64-bit above, which leaves a gap from 2 GiB to 4 GiB."""
    return code_bytes < MAX_CODE_BYTES or code_bytes > 2 * MAX_CODE_BYTES


def scale_and_shift(
    value: Float[Array, "G"], scale: Float[Array, "G"], offset: Float[Array, "..."]
) -> Float[Array, "G"]:
    """value * scale + offset in float32 with BOTH roundings, as bitsandbytes computes it; `scale` must not be negative.

    Compilers contract a product and a sum into one fused operation, which rounds once and differs in the last bit.
    The product passes through an integer OR with the scale's sign bit: always zero, but no compiler can know it.
    """
    as_int = lambda x: lax.bitcast_convert_type(x, jnp.int32)  # noqa: E731
    zero = lax.shift_right_logical(as_int(scale), jnp.full_like(as_int(scale), 31))
    return lax.bitcast_convert_type(as_int(value * scale) | zero, jnp.float32) + offset


def decode_absmax(
    absmax: UInt8[Array, "G"], absmax_scale: Float[Array, "S"], absmax_offset: Float[Array, ""]
) -> Float[Array, "G"]:
    """absmax[g] = map[code[g]] * scale[g // 256] + offset, float32."""
    (groups,) = absmax.shape
    value = jnp.asarray(dynamic_map()).at[absmax.astype(jnp.int32)].get(mode="promise_in_bounds")
    # A broadcast and not jnp.repeat, whose index array XLA folds into a constant, taking seconds over it.
    scale = jnp.broadcast_to(absmax_scale[:, None], (absmax_scale.size, GROUPS_PER_SCALE)).reshape(-1)[:groups]
    return scale_and_shift(value, scale, absmax_offset)


def dequantize(
    codes: UInt8[Array, "G 32"],
    absmax: Float[Array, "G"] | UInt8[Array, "G"],
    absmax_scale: Float[Array, "S"] | None,
    absmax_offset: Float[Array, ""] | None,
    dtype: jax.typing.DTypeLike,
    factor: Float[Array, ""] | None = None,
) -> Float[Array, "G 64"]:
    """One fusion and no temporaries for a float32 absmax, when XLA sees it whole."""
    if absmax_scale is not None:
        absmax = decode_absmax(absmax, absmax_scale, absmax_offset)
    if factor is not None:
        absmax = absmax * factor
    # Elements 0..31 of a block are the high nibbles, 32..63 the low ones. Shifting a broadcast (not stacking two
    # halves) keeps XLA from making two kernels and a temporary of the result's size.
    shifts = jnp.array([4, 0], jnp.uint8)[None, :, None]
    nibbles: Int[Array, "G 64"] = ((codes[:, None, :] >> shifts) & 15).reshape(-1, 64).astype(jnp.int32)
    values = jnp.asarray(NF4_CODE).at[nibbles].get(mode="promise_in_bounds")
    return (values * absmax[:, None]).astype(dtype)
