"""NF4 weights: 4 bits an element in blocks of 64, encoded and decoded with the values of bitsandbytes 0.50.

Source: QLoRA (arXiv 2305.14314); bitsandbytes's CPU quantize_4bit and quantize_blockwise.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from fastft_jax.pallas_kernels import nf4
from fastft_jax.pallas_kernels.nf4 import NF4_CODE, Implementation, dynamic_map
from fastft_jax.pallas_kernels.nf4.reference import decode_absmax
from fastft_jax.quant import blockwise
from fastft_jax.quant.exact import cascade_mean, divide

BLOCK = 64

__all__ = [
    *("BLOCK", "NF4_CODE", "NF4Array", "dequantize", "dequantize_stack", "from_bitsandbytes", "quantize", "stack"),
    "to_bitsandbytes",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4Array:
    """A matrix W [N, K] (or a stack of them) as a pytree: its arrays, and the shape of one matrix as static data.

    W is flattened row by row into G = ceil(N K / 64) blocks; the last one is padded with zeros. Byte j of a block holds
    element j in its high nibble and element j + 32 in its low one. `lead` is () or (L,) for a stack of L layers, and
    (L, E) where each layer has E matrices, every one with blocks, scales and an offset of its own. With `layer`, the
    array stands for that row of the stack: a loop over layers reads the stack where it lies.
    `compute` is what products with W are computed in: "fp8", or None for the dtype of the other factor.
    """

    codes: UInt8[Array, "*lead G 32"]
    absmax: Float[Array, "*lead G"] | UInt8[Array, "*lead G"]  # uint8 when double-quantised
    absmax_scale: Float[Array, "*lead S"] | None  # S = ceil(G / 256)
    absmax_offset: Float[Array, "*lead"] | None
    shape: tuple[int, ...] = field(metadata={"static": True})
    layer: Int[Array, ""] | None = None
    compute: str | None = field(default=None, metadata={"static": True})

    def at(self, layer: Int[Array, ""]) -> "NF4Array":
        """One matrix of a stack, by an index that may be traced; a copy where kernels cannot address the stack."""
        here = dataclasses.replace(self, layer=layer)
        return here if nf4.in_reach(self.codes.size) else here.sliced()

    def sliced(self) -> "NF4Array":
        """The matrix `layer` on its own, copied out of the stack."""
        if self.layer is None:
            return self
        stacked = dataclasses.replace(self, layer=None)
        return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False), stacked)

    def in_stack(self) -> tuple[Any, ...]:
        """Codes, absmax, its scale and offset, and the layer, as a kernel takes them: stacked, if only one high."""
        leaves = (self.codes, self.absmax, self.absmax_scale, self.absmax_offset)
        if self.layer is not None:
            return *leaves, self.layer
        return *(None if leaf is None else leaf[None] for leaf in leaves), 0

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def _scaled_to_one(x: Float[Array, "G 64"], n: int) -> tuple[Float[Array, "G 64"], Float[Array, "G"]]:
    """x / absmax by bitsandbytes's two rules: full blocks multiply by the reciprocal, a short last one divides."""
    absmax = jnp.max(jnp.abs(x), axis=1)
    scaled = x * divide(jnp.ones_like(absmax), absmax)[:, None]
    if n % BLOCK:
        # It also keeps the absmax of a short block off zero (1e-38 is subnormal: bits are moved, not computed with).
        last = jnp.where(absmax[-1:] > 0, absmax[-1:], np.float32(1e-38))
        scaled = jnp.concatenate([scaled[:-1], divide(x[-1:], last[:, None])])
        absmax = jnp.concatenate([absmax[:-1], last])
    return scaled, absmax


def quantize(w: Float[Array, "N K"], *, double_quant: bool = True) -> NF4Array:
    """Encode a float32, bfloat16 or float16 matrix on its device; jit-able.

    Codes, absmax, uint8 absmax and its scales equal bitsandbytes's on a CPU bit for bit, from whichever of the three
    dtypes (float32 arithmetic on the exact values), with the same bits from a CPU and a GPU. Two limits. Magnitudes
    below 2**-126 count as zero, and above 2**126 they have no float32 reciprocal. And bitsandbytes's offset, a mean of
    G values, depends on its machine: it is this one as long as torch sums on one thread (always so up to 32,768 blocks)
    with AVX2; otherwise it is a few ulp away, which may move a uint8 absmax that sits on an edge.
    Temporaries for [14336, 4096] in bfloat16: 9 MiB on an H200 (0.18 ms); XLA on a CPU makes the float32 copy.
    """
    if w.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"NF4 encodes float32, bfloat16 or float16, got {w.dtype}")
    n = w.size
    x = jnp.pad(w.reshape(-1), (0, -n % BLOCK)).reshape(-1, BLOCK).astype(jnp.float32)
    scaled, absmax = _scaled_to_one(x, n)
    midpoints = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)
    nearest = sum((scaled > m).astype(jnp.uint8) for m in midpoints)  # midpoints strictly below: a tie goes down
    codes = (nearest[:, : BLOCK // 2] << 4) | nearest[:, BLOCK // 2 :]
    if not double_quant:
        return NF4Array(codes, absmax, None, None, w.shape)
    offset = cascade_mean(absmax)
    absmax_codes, scale = blockwise.quantize(absmax - offset)
    return NF4Array(codes, absmax_codes, scale, offset, w.shape)


def dequantize(
    q: NF4Array,
    dtype: jax.typing.DTypeLike,
    factor: Float[Array, ""] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "N K"]:
    """code * absmax (times `factor`, before that product) in float32, then one cast to `dtype`; one matrix."""
    q = q.sliced()
    blocks = nf4.dequantize(
        q.codes, q.absmax, q.absmax_scale, q.absmax_offset, factor, dtype=dtype, implementation=implementation
    )
    n = math.prod(q.shape)
    flat = blocks.reshape(-1)
    return (flat if flat.size == n else flat[:n]).reshape(q.shape)


def dequantize_stack(q: NF4Array, dtype: jax.typing.DTypeLike) -> Float[Array, "E N K"]:
    """`dequantize` of E matrices at once, the same values: `q` has lead (E,), or (L, E) and a layer."""
    q = q.sliced()
    absmax = q.absmax
    if q.absmax_scale is not None:  # scales of 256 blocks do not run on from one matrix to the next
        absmax = jax.vmap(decode_absmax)(absmax, q.absmax_scale, q.absmax_offset)
    blocks = nf4.dequantize(q.codes.reshape(-1, BLOCK // 2), absmax.reshape(-1), dtype=dtype)
    rows = blocks.reshape(q.codes.shape[0], -1)
    n = math.prod(q.shape)
    return (rows if rows.shape[1] == n else rows[:, :n]).reshape(-1, *q.shape)


def stack(arrays: Sequence[NF4Array]) -> NF4Array:
    """L matrices of one shape on a new leading axis, for lax.scan. Raises ValueError when they differ."""
    kinds = {(a.shape, a.absmax.dtype, a.compute) for a in arrays}
    if len(kinds) != 1:
        raise ValueError(f"only NF4 arrays of one shape and kind can be stacked, got {sorted(map(str, kinds))}")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)


def to_bitsandbytes(q: NF4Array) -> dict[str, Any]:
    """One matrix as bitsandbytes stores it, keyed by the suffixes of its checkpoints; numpy arrays on the host.

    "weight" uint8 [ceil(n / 2), 1] with element 2i in the high nibble of byte i, "absmax", "quant_map", and for double
    quantisation "nested_absmax", "nested_quant_map" and the Python float "nested_offset".
    """
    codes = np.asarray(q.codes)
    n = math.prod(q.shape)
    elements = np.concatenate([codes >> 4, codes & 15], axis=-1).reshape(-1)
    weight = (elements[0::2] << 4 | elements[1::2])[: -(-n // 2), None]
    state = {"weight": weight, "absmax": np.asarray(q.absmax), "quant_map": NF4_CODE.copy()}
    if q.absmax_scale is not None:
        state |= {"nested_absmax": np.asarray(q.absmax_scale), "nested_quant_map": dynamic_map().copy()}
        state["nested_offset"] = float(q.absmax_offset)
    return state


def from_bitsandbytes(
    weight: np.ndarray,
    absmax: np.ndarray,
    shape: tuple[int, ...],
    nested_absmax: np.ndarray | None = None,
    nested_offset: float | None = None,
) -> NF4Array:
    """The inverse of `to_bitsandbytes`, for block size 64 (and 256 for the nested state) and bitsandbytes's own maps.

    Raises ValueError when the sizes do not belong to a matrix of that shape.
    """
    n = math.prod(shape)
    blocks = -(-n // BLOCK)
    if weight.size != -(-n // 2) or absmax.size != blocks:
        raise ValueError(f"{weight.size} bytes and {absmax.size} scales are not an NF4 matrix of shape {shape}")
    packed = np.full(blocks * BLOCK // 2, 0x77, np.uint8)  # code 7 is zero
    packed[: weight.size] = np.asarray(weight, np.uint8).reshape(-1)
    codes = _in_our_order(packed.reshape(blocks, BLOCK // 2))
    if nested_absmax is None:
        return NF4Array(codes, jnp.asarray(absmax, jnp.float32), None, None, tuple(shape))
    scale, offset = jnp.asarray(nested_absmax, jnp.float32), jnp.float32(nested_offset)
    return NF4Array(codes, jnp.asarray(absmax, jnp.uint8), scale, offset, tuple(shape))


@jax.jit
def _in_our_order(packed: UInt8[Array, "G 32"]) -> UInt8[Array, "G 32"]:
    """Neighbours in a byte -> elements j and j + 32 in a byte."""
    elements = jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, BLOCK)
    return elements[:, : BLOCK // 2] << 4 | elements[:, BLOCK // 2 :]
