"""LayerNorm and its gradients in plain jnp: float32 throughout, one cast at the end."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels.rms_norm.reference import with_room


def _normalise(x: Float[Array, "*B D"], eps: float) -> tuple[Float[Array, "*B D"], Float[Array, "*B 1"]]:
    xf = x.astype(jnp.float32)
    centred = xf - jnp.mean(xf, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return centred * rstd, rstd


def forward(
    x: Float[Array, "*B D"], weight: Float[Array, "D"], bias: Float[Array, "D"] | None, *, eps: float, room: int
) -> Float[Array, "*B D+room"]:
    y = _normalise(x, eps)[0] * weight.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return with_room(y.astype(x.dtype), room)


def backward(
    dy: Float[Array, "*B D+room"], x: Float[Array, "*B D"], weight: Float[Array, "D"], *, eps: float, train_weight: bool
) -> tuple[Float[Array, "*B D"], Float[Array, "D"] | None, Float[Array, "D"] | None]:
    """With n the normalised x and g = dy w: dx = rstd (g - mean(g) - n mean(g n)); dw = sum dy n; db = sum dy."""
    d = x.shape[-1]
    normed, rstd = _normalise(x, eps)
    dyf = dy[..., :d].astype(jnp.float32)
    g = dyf * weight.astype(jnp.float32)
    mean = lambda a: jnp.mean(a, axis=-1, keepdims=True)  # noqa: E731
    dx = (rstd * (g - mean(g) - normed * mean(g * normed))).astype(x.dtype)
    if not train_weight:
        return dx, None, None
    over_rows = lambda a: jnp.sum(a.reshape(-1, d), axis=0)  # noqa: E731
    return dx, over_rows(dyf * normed), over_rows(dyf)
