"""RMSNorm and its gradients in plain jnp; everything in float32 but the two roundings that transformers makes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def forward(
    x: Float[Array, "*B D"], weight: Float[Array, "D"], *, eps: float, plus_one: bool, room: int
) -> Float[Array, "*B D+room"]:
    """The quotient is rounded before the weight multiplies it, or after if `plus_one` (Gemma)."""
    xf = x.astype(jnp.float32)
    normed = xf * jax.lax.rsqrt(jnp.mean(xf * xf, axis=-1, keepdims=True) + eps)
    if plus_one:
        y = (normed * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    else:
        y = weight.astype(x.dtype) * normed.astype(x.dtype)
    return with_room(y, room)


def add_forward(
    x: Float[Array, "*B D"],
    delta: Float[Array, "*B D"],
    weight: Float[Array, "D"],
    *,
    eps: float,
    plus_one: bool,
    room: int,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D+room"]]:
    h = x + delta
    return h, forward(h, weight, eps=eps, plus_one=plus_one, room=room)


def backward(
    dy: Float[Array, "*B D+room"],
    x: Float[Array, "*B D"],
    weight: Float[Array, "D"],
    d_residual: Float[Array, "*B D"] | None,
    *,
    eps: float,
    plus_one: bool,
    train_weight: bool = False,
    with_normed: bool = False,
) -> tuple[Float[Array, "*B D"], Float[Array, "D"] | Float[Array, "*B D"] | None]:
    """With n = x rstd and g = dy w: dx = rstd (g - n mean(g n)) [+ d_residual]; dw = sum over rows of dy n.

    dx, and dw if `train_weight`, or the norm's result if `with_normed`.
    """
    xf, dyf = x.astype(jnp.float32), dy[..., : x.shape[-1]].astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.mean(xf * xf, axis=-1, keepdims=True) + eps)
    normed = xf * rstd
    scale = 1.0 + weight.astype(jnp.float32) if plus_one else weight.astype(x.dtype).astype(jnp.float32)
    g = dyf * scale
    dx = rstd * (g - normed * jnp.mean(g * normed, axis=-1, keepdims=True))
    if d_residual is not None:
        dx = dx + d_residual.astype(jnp.float32)
    if with_normed:
        return dx.astype(x.dtype), forward(x, weight, eps=eps, plus_one=plus_one, room=0)
    dw = jnp.sum((dyf * normed).reshape(-1, x.shape[-1]), axis=0).astype(weight.dtype) if train_weight else None
    return dx.astype(x.dtype), dw


def with_room(y: Float[Array, "*B D"], room: int) -> Float[Array, "*B D+room"]:
    """y with `room` columns of zeros after its own."""
    return y if room == 0 else jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, room)])
