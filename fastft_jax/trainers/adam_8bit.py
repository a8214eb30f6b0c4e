"""Adam with 8-bit moments: bitsandbytes's AdamW8bit as an optax transformation."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels.adamw_8bit import BLOCK, Implementation, Moment, adam, adam_8bit

MIN_8BIT_SIZE = 4096
# What a part of a block is filled up with: codes that decode to zero, and so leave the block's absmax alone.
ZERO_M, ZERO_V = 127, 0


class Adam8bitState(NamedTuple):
    """Moments by the parameter's path: a plain pytree of arrays, whatever container the parameters live in.

    A parameter is M matrices of n elements, each cut into S = ceil(n / 256) blocks of its own: codes uint8 [M, n] and
    absmax float32 [M, S].
    """

    count: Int[Array, ""]
    m: dict[str, Moment | Float[Array, "..."]]
    v: dict[str, Moment | Float[Array, "..."]]


def _matrices(leaf: Array) -> tuple[int, int]:
    """(M, n): a stack of layers [M, ...] with three or more axes counts as M parameters, anything else as one."""
    count = leaf.shape[0] if leaf.ndim > 2 else 1
    return count, leaf.size // max(1, count)


def _blocks(x: Array, fill: int = 0) -> Array:
    """[M, n] -> [M S, 256]; free where n is a multiple of 256."""
    padding = -x.shape[1] % BLOCK
    return (jnp.pad(x, ((0, 0), (0, padding)), constant_values=fill) if padding else x).reshape(-1, BLOCK)


def _step(grad: Array, m: Moment, v: Moment, *args: Array, **options) -> tuple[Array, Moment, Moment]:
    """`adam_8bit` for a whole leaf, in the state's shapes."""
    count, n = m.codes.shape

    def unblock(x: Array) -> Array:
        return x.reshape(count, -1)[:, :n]

    def flat(moment: Moment, fill: int) -> Moment:
        return Moment(_blocks(moment.codes, fill), moment.absmax.reshape(-1))

    update, *moments = adam_8bit(_blocks(grad.reshape(count, n)), flat(m, ZERO_M), flat(v, ZERO_V), *args, **options)
    m, v = (Moment(unblock(codes), absmax.reshape(count, -1)) for codes, absmax in moments)
    return unblock(update).reshape(grad.shape), m, v


def scale_by_adam_8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    min_8bit_size: int = MIN_8BIT_SIZE,
    implementation: Implementation | None = None,
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
            return Moment(jnp.zeros((count, n), jnp.uint8), jnp.zeros((count, -(-n // BLOCK)), jnp.float32))

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
            quantised = isinstance(state.m[path], Moment)
            step = functools.partial(_step, implementation=implementation) if quantised else adam
            update, m[path], v[path] = step(
                grad, state.m[path], state.v[path], correction1, correction2, b1=b1, b2=b2, eps=eps
            )
            updates.append(update)
        return treedef.unflatten(updates), Adam8bitState(count, m, v)

    return optax.GradientTransformation(init, update)
