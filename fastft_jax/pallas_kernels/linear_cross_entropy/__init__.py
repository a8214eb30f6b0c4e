"""Cross-entropy of a linear head, without ever holding the logits of more than one chunk of tokens."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.linear_cross_entropy import chunks, reference
from fastft_jax.pallas_kernels.linear_cross_entropy.reference import IGNORE_INDEX, Terms

Implementation = Literal["xla", "triton"]

__all__ = ["IGNORE_INDEX", "Implementation", "default_chunk_size", "linear_cross_entropy"]


def default_chunk_size(vocab_size: int, budget_bytes: int = 1 << 29) -> int:
    """Tokens a chunk: the largest power of two, 128 at least, whose fp32 logits fit `budget_bytes`.

    The compiled step needs about 1.5 times that in all: the fp32 logits and their gradient in bf16. Twice the budget
    is no faster on an H200 (27.8 ms for 8192 tokens of an 8B model either way), half of it 7% slower.
    """
    return 1 << (max(128, budget_bytes // (4 * vocab_size)).bit_length() - 1)


class _Static(NamedTuple):
    """What fixes the program, in one hashable argument."""

    terms: Terms
    chunk_size: int
    train_weight: bool
    with_accuracy: bool
    implementation: str


def linear_cross_entropy(
    hidden: Float[Array, "M D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "M"],
    *,
    chunk_size: int,
    train_weight: bool = False,
    with_accuracy: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The summed loss of the trained tokens, and how many of them argmax predicts.

    loss_t = lse(z_t) - (1 - eps) z_t[y_t] - eps mean(z_t) + z_loss lse(z_t)^2, where
    z_t = softcap tanh(logit_scale W h_t / softcap), without a `softcap` logit_scale W h_t; eps is `label_smoothing`,
    as in torch.nn.functional.cross_entropy. A token is trained unless its label is `ignore_index`; others are left out
    of the work, not only of the sum: the cost is that of ceil(trained tokens / chunk_size) chunks.

    Sums, not means: the caller divides by the trained tokens of the whole accumulated batch. Loss and gradients come
    from one pass over chunks of `chunk_size` tokens (M need not be a multiple), and the backward pass only scales
    them, so at most [chunk_size, V] logits exist; without differentiation only the loss is computed.

    Logits and log-sum-exp are fp32 and so is the accumulation of every GEMM; their inputs, the logits' gradient
    included, have hidden's dtype (`weight` is cast to it), and so has the hidden gradient. With `train_weight` the
    weight's gradient is accumulated in fp32 and returned in weight's dtype; without, it is zero and costs nothing.
    The count of right predictions is 0 unless `with_accuracy`; it has no gradient. Reverse-mode only.

    A label outside [0, V) other than `ignore_index` makes the loss NaN. `implementation=None` picks "triton" (the
    kernel between the GEMMs) on a GPU, "xla" elsewhere. Raises ValueError for shapes that do not fit, numbers out of
    range or an unknown implementation.
    Source: Liger Kernel (Hsu et al. 2024, arXiv:2410.10989), section 3.2; z-loss: PaLM (arXiv:2204.02311), section 5;
    the maths is in `reference.py`.
    """
    if implementation not in (None, "xla", "triton"):
        raise ValueError(f'implementation must be None, "xla" or "triton", got {implementation!r}')
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [M, D] and weight [V, D] do not fit: {hidden.shape} and {weight.shape}")
    if labels.shape != hidden.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.signedinteger):
        raise ValueError(f"labels must be signed integers {hidden.shape[:1]}, got {labels.dtype} {labels.shape}")
    if chunk_size < 1 or hidden.shape[0] < 1:
        raise ValueError(f"chunk_size and the number of tokens must be at least 1: {chunk_size}, {hidden.shape[0]}")
    if (softcap is not None and softcap <= 0) or logit_scale <= 0:
        raise ValueError(f"softcap and logit_scale must be positive, got {softcap} and {logit_scale}")
    if not 0 <= label_smoothing <= 1 or z_loss < 0:
        raise ValueError(f"label_smoothing must lie in [0, 1] and z_loss be >= 0, got {label_smoothing} and {z_loss}")
    terms = Terms(softcap, logit_scale, label_smoothing, z_loss, ignore_index)
    implementation = implementation or ("triton" if pallas.on_gpu() else "xla")
    return _loss(hidden, weight, labels, _Static(terms, chunk_size, train_weight, with_accuracy, implementation))


def _sums(hidden, weight, labels, static: _Static, with_grads: bool) -> chunks.Sums:
    if static.implementation == "triton":
        from fastft_jax.pallas_kernels.linear_cross_entropy import triton as module
    else:
        module = reference
    return chunks.sum_chunks(
        hidden,
        weight,
        labels,
        static.terms,
        chunk_loss=module.chunk_loss,
        chunk_size=static.chunk_size,
        with_grads=with_grads,
        train_weight=static.train_weight,
        with_accuracy=static.with_accuracy,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _loss(hidden, weight, labels, static):
    sums = _sums(hidden, weight, labels, static, with_grads=False)
    return sums.loss, sums.correct


def _forward(hidden, weight, labels, static):
    sums = _sums(hidden, weight, labels, static, with_grads=True)
    # An empty array carries weight's dtype to the backward pass; residuals must be arrays.
    return (sums.loss, sums.correct), (sums.dh, sums.dw, jnp.zeros((0,), weight.dtype))


def _backward(static, residuals, cotangents):
    dh, dw, like_weight = residuals
    scale = cotangents[0]
    dh = (dh.astype(jnp.float32) * scale).astype(dh.dtype)
    return dh, (dw * scale).astype(like_weight.dtype) if static.train_weight else None, None


_loss.defvjp(_forward, _backward)
