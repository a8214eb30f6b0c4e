"""Rotary position embedding in plain jnp, of one array of heads or of a whole fused projection."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels.rms_norm import reference as rms_norm


class Layout(NamedTuple):
    """What a row of a fused projection holds: N query heads, then K key heads, then K value heads, H wide each.

    `eps` and `plus_one` are those of the RMSNorm of query and key heads, where they are normalised.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float | None = None
    plus_one: bool = False


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T P/2"], sin: Float[Array, "B T P/2"]
) -> Float[Array, "B T N H"]:
    """`[a cos - b sin, b cos + a sin, rest]` with a, b the two halves of a head's first P elements, in float32, cast
    back to x's dtype.

    Halves (not even and odd elements) are paired, as transformers' `rotate_half` does; `rest` is empty unless P < H.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    half = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def forward(
    qkv: Float[Array, "*L_B T (N+2K)*H"],
    cos: Float[Array, "B T P/2"],
    sin: Float[Array, "B T P/2"],
    norms: tuple[Float[Array, "H"], ...],
    layout: Layout,
    index: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """`norms` holds the weights of the query and the key norm, or nothing; with an index, qkv is a stack's slice."""
    q, k, v = _split(_at(qkv, index), layout)
    if norms:
        options = {"eps": layout.eps, "plus_one": layout.plus_one, "room": 0}
        q, k = (rms_norm.forward(x, weight, **options) for x, weight in zip((q, k), norms, strict=True))
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def backward(
    cotangents: tuple[Array, Array, Array],
    cos: Float[Array, "B T P/2"],
    sin: Float[Array, "B T P/2"],
    norms: tuple[Float[Array, "H"], ...],
    qkv: Float[Array, "*L_B T (N+2K)*H"] | None,
    layout: Layout,
    index: Int[Array, ""] | None = None,
) -> Float[Array, "B T (N+2K)*H"]:
    """The rotation's transpose is the rotation by minus the angle; `qkv` is needed only where heads are normalised."""
    *rotated, dv = cotangents
    grads = [apply_rope(d.astype(jnp.float32), cos, -sin) for d in rotated]
    if norms:
        options = {"eps": layout.eps, "plus_one": layout.plus_one, "train_weight": False}
        grads = [
            rms_norm.backward(d, x, weight, None, **options)[0]
            for d, x, weight in zip(grads, _split(_at(qkv, index), layout)[:2], norms, strict=True)
        ]
    return jnp.concatenate([*(d.astype(dv.dtype) for d in grads), dv], axis=2).reshape(*dv.shape[:2], -1)


def _at(qkv: Array, index: Int[Array, ""] | None) -> Float[Array, "B T (N+2K)*H"]:
    return qkv if index is None else lax.dynamic_index_in_dim(qkv, index, keepdims=False)


def _split(qkv: Float[Array, "B T (N+2K)*H"], layout: Layout) -> list[Array]:
    n, k = layout.num_heads, layout.num_kv_heads
    return jnp.split(qkv.reshape(*qkv.shape[:2], n + 2 * k, layout.head_dim), (n, n + k), axis=2)
