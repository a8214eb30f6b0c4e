"""Cross-entropy of a linear head, without ever holding the logits of more than one chunk of tokens."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels.linear_cross_entropy.reference import IGNORE_INDEX, scan_chunks

__all__ = ["IGNORE_INDEX", "default_chunk_size", "linear_cross_entropy"]


def default_chunk_size(vocab_size: int, budget_bytes: int = 1 << 30) -> int:
    """Tokens a chunk: the largest power of two, 128 at least, whose fp32 logits fit `budget_bytes`.

    The compiled step needs about 1.5 times that in all: the fp32 logits and their gradient in bf16.
    """
    return 1 << (max(128, budget_bytes // (4 * vocab_size)).bit_length() - 1)


def linear_cross_entropy(
    hidden: Float[Array, "M D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "M"],
    *,
    chunk_size: int,
    train_weight: bool = False,
    with_accuracy: bool = False,
    implementation: Literal["xla"] | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """`sum_t logsumexp(W h_t) - (W h_t)[y_t]` over the tokens whose label is not -100, and how many are right.

    Sums, not means: the caller divides by the trained tokens of the whole accumulated batch. Loss and gradients come
    from one pass over chunks of `chunk_size` tokens (M need not be a multiple), and the backward pass only scales
    them, so at most [chunk_size, V] logits exist; without differentiation only the loss is computed.

    Logits and log-sum-exp are fp32 and so is the accumulation of every GEMM; their inputs, the logits' gradient
    included, have hidden's dtype (`weight` is cast to it), and so has the hidden gradient. With `train_weight` the
    weight's gradient is accumulated in fp32 and returned in weight's dtype; without, it is zero and costs nothing.
    The count of right predictions is 0 unless `with_accuracy`; it has no gradient.

    A label outside [0, V) other than -100 makes the loss NaN. Raises ValueError for shapes that do not fit, a
    non-positive `chunk_size` or an unknown implementation.
    Source: Liger Kernel (Hsu et al. 2024, arXiv:2410.10989), section 3.2; the maths is in `reference.py`.
    """
    if implementation not in (None, "xla"):
        raise ValueError(f'implementation must be None or "xla", got {implementation!r}')
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [M, D] and weight [V, D] do not fit: {hidden.shape} and {weight.shape}")
    if labels.shape != hidden.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.signedinteger):
        raise ValueError(f"labels must be signed integers {hidden.shape[:1]}, got {labels.dtype} {labels.shape}")
    if chunk_size < 1 or hidden.shape[0] < 1:
        raise ValueError(f"chunk_size and the number of tokens must be at least 1: {chunk_size}, {hidden.shape[0]}")
    return _linear_cross_entropy(hidden, weight, labels, chunk_size, train_weight, with_accuracy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _linear_cross_entropy(hidden, weight, labels, chunk_size, train_weight, with_accuracy):
    loss, correct, _, _ = scan_chunks(
        hidden,
        weight,
        labels,
        chunk_size=chunk_size,
        with_grads=False,
        train_weight=False,
        with_accuracy=with_accuracy,
    )
    return loss, correct


def _forward(hidden, weight, labels, chunk_size, train_weight, with_accuracy):
    loss, correct, dh, dw = scan_chunks(
        hidden,
        weight,
        labels,
        chunk_size=chunk_size,
        with_grads=True,
        train_weight=train_weight,
        with_accuracy=with_accuracy,
    )
    # An empty array carries weight's dtype to the backward pass; residuals must be arrays.
    return (loss, correct), (dh, dw, jnp.zeros((0,), weight.dtype))


def _backward(chunk_size, train_weight, with_accuracy, residuals, cotangents):
    dh, dw, like_weight = residuals
    scale = cotangents[0]
    dh = (dh.astype(jnp.float32) * scale).astype(dh.dtype)
    return dh, (dw * scale).astype(like_weight.dtype) if train_weight else None, None


_linear_cross_entropy.defvjp(_forward, _backward)
