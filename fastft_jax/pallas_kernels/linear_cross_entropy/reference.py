"""The losses of one chunk of logits and their gradient, in plain jnp: what a CPU runs and what the kernel must equal.

With the head's product `x = h W^T`, the logits `z = cap tanh(s x / cap)` (or `s x`), `l = logsumexp(z)`:

    loss   = l - (1 - eps) z_y - eps mean(z) + zeta l^2
    dloss/dx = [(1 + 2 zeta l) softmax(z) - (1 - eps) onehot(y) - eps / V] s (1 - (z / cap)^2)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

IGNORE_INDEX = -100


class Terms(NamedTuple):
    """What the loss is made of; static."""

    softcap: float | None = None  # cap
    logit_scale: float = 1.0  # s
    label_smoothing: float = 0.0  # eps
    z_loss: float = 0.0  # zeta
    ignore_index: int = IGNORE_INDEX


class ChunkLoss(NamedTuple):
    """Of C tokens. Values of tokens without a label mean nothing, but their gradient is zero."""

    loss: Float[Array, "C"]
    correct: Bool[Array, "C"] | None
    gradient: Float[Array, "C V"] | None  # dloss/dx, when multiplied by `factor`
    factor: Float[Array, "C"] | None = None  # None: 1


def logits_and_slope(x: Float[Array, "..."], terms: Terms) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """z(x), and dz/dx / s: None where that is 1."""
    if terms.logit_scale != 1:
        x = x * terms.logit_scale
    if terms.softcap is None:
        return x, None
    t = jnp.tanh(x / terms.softcap)
    return terms.softcap * t, 1 - t * t


def chunk_loss(
    x: Float[Array, "C V"],
    labels: Int[Array, "C"],
    terms: Terms,
    *,
    gradient_dtype: jax.typing.DTypeLike | None,
    with_accuracy: bool,
) -> ChunkLoss:
    """Losses, right predictions (if asked) and x's gradient, computed in float32, as `gradient_dtype` (None: none)."""
    vocab = x.shape[1]
    trained = labels != terms.ignore_index
    z, slope = logits_and_slope(x, terms)
    peak = jnp.max(z, axis=-1)
    lse = peak + jnp.log(jnp.sum(jnp.exp(z - peak[:, None]), axis=-1))
    # A label outside the vocabulary reads NaN (mode "fill"): a wrong label must not pass for a right one.
    index = jnp.where(trained, jnp.where(labels < 0, vocab, labels), 0)
    target = jnp.take_along_axis(z, index[:, None], axis=-1, mode="fill", fill_value=jnp.nan)[:, 0]
    eps, zeta = terms.label_smoothing, terms.z_loss
    loss = lse - (1 - eps) * target + zeta * lse * lse
    if eps:
        loss -= eps * jnp.mean(z, axis=-1)
    correct = jnp.argmax(z, axis=-1).astype(labels.dtype) == labels if with_accuracy else None
    if gradient_dtype is None:
        return ChunkLoss(loss, correct, None)
    onehot = jnp.arange(vocab, dtype=labels.dtype)[None, :] == labels[:, None]
    gradient = jnp.exp(z - lse[:, None]) * (1 + 2 * zeta * lse)[:, None] - (1 - eps) * onehot - eps / vocab
    if slope is not None:
        gradient *= slope
    gradient = jnp.where(trained[:, None], gradient * terms.logit_scale, 0.0)
    return ChunkLoss(loss, correct, gradient.astype(gradient_dtype))
