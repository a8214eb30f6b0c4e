"""Adam with 8-bit moments: bitsandbytes's AdamW8bit as an optax transformation."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt8

from fastft_jax.quant import blockwise

MIN_8BIT_SIZE = 4096


class Moment(NamedTuple):
    """A moment of one parameter: M matrices of n elements, each cut into S = ceil(n / 256) blocks of its own."""

    codes: UInt8[Array, "M n"]
    absmax: Float[Array, "M S"]


class Adam8bitState(NamedTuple):
    """Moments by the parameter's path: a plain pytree of arrays, whatever container the parameters live in."""

    count: Int[Array, ""]
    m: dict[str, Moment | Float[Array, "..."]]
    v: dict[str, Moment | Float[Array, "..."]]


def _matrices(leaf: Array) -> tuple[int, int]:
    """(M, n): a stack of layers [M, ...] with three or more axes counts as M parameters, anything else as one."""
    count = leaf.shape[0] if leaf.ndim > 2 else 1
    return count, leaf.size // max(1, count)


def _encode(x: Float[Array, "..."], signed: bool) -> Moment:
    flat = x.reshape(_matrices(x))
    return Moment(*jax.vmap(lambda row: blockwise.quantize(row, signed=signed))(flat))


def _decode(moment: Moment | Array, like: Array, signed: bool) -> Float[Array, "..."]:
    if not isinstance(moment, Moment):
        return moment
    rows = jax.vmap(lambda codes, absmax: blockwise.dequantize(codes, absmax, signed=signed))(*moment)
    return rows.reshape(like.shape)


def scale_by_adam_8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, min_8bit_size: int = MIN_8BIT_SIZE
) -> optax.GradientTransformation:
    """u = (m / (1 - b1^t)) / (sqrt(v) / sqrt(1 - b2^t) + eps), from exact moments that are then stored in 8 bits.

    m has the signed dynamic map and v the unsigned one, in blocks of 256; parameters of fewer than `min_8bit_size`
    elements keep float32 moments. Weight decay and the learning rate come after it. Gradients are upcast to float32.
    Source: 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861); bitsandbytes 0.50, AdamW8bit on a CPU.
    """

    log1, log2 = (math.log(b) if b else -math.inf for b in (b1, b2))

    def paths(tree):
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves], treedef

    def init(params):
        def zeros(leaf):
            count, n = _matrices(leaf)
            if n < min_8bit_size:
                return jnp.zeros(leaf.shape, jnp.float32)
            return Moment(jnp.zeros((count, n), jnp.uint8), jnp.zeros((count, -(-n // blockwise.BLOCK)), jnp.float32))

        leaves, _ = paths(params)
        m, v = ({path: zeros(leaf) for path, leaf in leaves} for _ in range(2))
        return Adam8bitState(jnp.zeros([], jnp.int32), m, v)

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        t = count.astype(jnp.float32)
        # 1 - b^t by expm1: for b2 = 0.999 a float32 power would lose half the digits at the first step.
        correction1 = -jnp.expm1(t * log1)
        correction2 = jnp.sqrt(-jnp.expm1(t * log2))
        leaves, treedef = paths(grads)
        updates, m, v = [], {}, {}
        for path, grad in leaves:
            g = grad.astype(jnp.float32)
            m_leaf = b1 * _decode(state.m[path], g, True) + (1 - b1) * g
            v_leaf = b2 * _decode(state.v[path], g, False) + (1 - b2) * g * g
            updates.append((m_leaf / (jnp.sqrt(v_leaf) / correction2 + eps)) / correction1)
            quantised = isinstance(state.m[path], Moment)
            m[path] = _encode(m_leaf, True) if quantised else m_leaf
            v[path] = _encode(v_leaf, False) if quantised else v_leaf
        return treedef.unflatten(updates), Adam8bitState(count, m, v)

    return optax.GradientTransformation(init, update)
