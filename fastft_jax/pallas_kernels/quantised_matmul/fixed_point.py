"""NF4 in fixed point: codes that `prmt` looks up, four at a time, and `dp4a` multiplies, four at a time.

The codebook t becomes 14-bit integers 128 high + low = 8192 + 7854 t, both bytes below 128. `prmt` picks four bytes of
eight by the low three bits of four nibbles; where a nibble's fourth bit is set it gives the picked byte's sign instead:
zero, as all are below 128. So one `prmt` decodes the negative half of the codebook and gives zero on the positive one,
a second, on the nibbles with that bit flipped, the reverse. Packed codes are selectors as they lie.

x of half a block becomes 15-bit integers 128 high + low, signed, times a float32 step. What the 8192 adds to a sum is
known before (`bias`), so that zeros stay exactly zero. The product of the two low bytes, at most 2^-14 of the largest,
is left out. Both roundings are more than ten times finer than that of a weight to bfloat16.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.nf4.codebooks import NF4_CODE

UNIT, ZERO = 7854, 8192
"""Of all the units that fit, the one at which the rounded codebook errs least: 1.5e-4 of a value at most."""
LEVELS = np.rint(NF4_CODE.astype(np.float64) * UNIT).astype(np.int32) + ZERO
X_LEVELS = 127 * 128
"""What the largest |x| of half a block becomes."""
TOTAL_UNIT = 128 / (X_LEVELS * UNIT)
"""What 1 of `multiply`'s result stands for, where the largest |x| is 1."""

Words = Int32[Array, "#rows halves"]

# [high, low] bytes by [negative, other] codes by two registers, which hold four bytes each
_BYTES = np.stack([LEVELS >> 7, LEVELS & 127]).astype("u1").reshape(2, 2, 8).view("<u4")
TABLE = _BYTES[..., 0].reshape(4).astype(np.int32)
"""The first of each two registers. The second is a constant of the instruction, which has room for no more than one."""


def split_x(x: Int32[Array, "*dims"]) -> tuple[Int32[Array, "*dims"], Int32[Array, "*dims"]]:
    """Integers of at most `X_LEVELS` as 128 high + low, low in -64..63."""
    high = (x + 64) >> 7
    return high, x - 128 * high


def bias(x: Int32[Array, "halves 32"]) -> Int32[Array, "halves"]:
    """What `ZERO`, a high byte of 64, adds to the sums of `multiply`, with the other sign."""
    return -(ZERO // 128) * jnp.sum(x, axis=1)


def multiply_asm(split_low: bool) -> str:
    """PTX of `multiply`: $0 the result, $1 to $4 words, $5 to $20 x, $21 the bias, $22 to $25 the table.

    `split_low` gives `dp4a` the two halves of the low byte's look-up one by one instead of joined: fewer operations of
    the integer unit, more of the multiplier's.
    """

    def look_up(out: str, byte: int, part: int) -> list[str]:
        halves = zip((f"{out}0", f"{out}1"), ("w", "v"), (0, 1), strict=True)
        return [f"prmt.b32 {r}, ${22 + 2 * byte + h}, {_BYTES[byte, h, 1]}, {s}{part};" for r, s, h in halves]

    def dot(total: str, w: str, x: int) -> str:
        return f"dp4a.u32.s32 {total}, {w}, ${x}, {total};"

    code = ["{", ".reg .b32 w0, w1, v0, v1, h0, h1, l0, l1, high, low;", "mov.b32 high, 0;", "mov.b32 low, $21;"]
    for word in range(4):
        code += [f"mov.b32 w0, ${1 + word};", "xor.b32 v0, w0, 0x88888888;"]
        code += ["shr.u32 w1, w0, 16;", "shr.u32 v1, v0, 16;"]
        for part in (0, 1):
            x_high, x_low = (5 + 8 * s + 2 * word + part for s in (0, 1))
            code += [*look_up("h", 0, part), "or.b32 h0, h0, h1;", dot("high", "h0", x_high), dot("low", "h0", x_low)]
            code += look_up("l", 1, part)
            code += [dot("low", "l1", x_high)] if split_low else ["or.b32 l0, l0, l1;"]
            code += [dot("low", "l0", x_high)]
    return "\n".join([*code, "shl.b32 high, high, 7;", "add.s32 $0, high, low;", "}"])


def multiply(
    words: Sequence[Words], x: Sequence[Words], bias: Words, table: Sequence[Words], *, split_low: bool, interpret: bool
) -> Int32[Array, "rows halves"]:
    """The sum over half a block, 4 words of 8 codes, of codebook times x, in units of 128.

    x: the high bytes for the first four codes of word 0, for its last four, for those of word 1, ...; then the low
    bytes so. Interpreting has no PTX: it computes the same integers.
    """
    if interpret:
        return _multiply_in_jnp(words, x, bias)
    shape = words[0].shape
    operands = [jnp.broadcast_to(a, shape) for a in (*words, *x, bias, *table)]
    (total,) = pallas.inline_asm(
        multiply_asm(split_low),
        args=operands,
        constraints=CONSTRAINTS,
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.int32)],
    )
    return total


CONSTRAINTS = "=r" + 25 * ",r"
"""A register for the result and each operand of `multiply_asm`."""


def _multiply_in_jnp(words, x, bias):
    # a kernel captures no arrays: the table is written out
    levels = sum(jnp.where(jnp.arange(16) == code, int(value), 0) for code, value in enumerate(LEVELS))
    nibbles = jnp.stack(words)[:, None] >> (4 * jnp.arange(8))[:, None, None] & 15
    level = levels[nibbles]  # [4, 8, rows, halves]
    x = jnp.stack(x).reshape(2, 4, 2, 1, 1, -1)  # high and low, words, their halves
    # an arithmetic shift right of a byte brought to the top leaves it with its sign
    x = x << (24 - 8 * jnp.arange(4))[:, None, None] >> 24
    high, low = x.reshape(2, 4, 8, 1, -1)
    products = 128 * (level >> 7) * high + (level >> 7) * low + (level & 127) * high
    return jnp.sum(products, axis=(0, 1)) + bias
