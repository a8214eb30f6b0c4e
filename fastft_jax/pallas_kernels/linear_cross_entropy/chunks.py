"""The loop over chunks of trained tokens: the GEMMs of a linear head, with the loss of their logits in between.

`x = h W^T`, loss and `dx` of x (`reference.chunk_loss` or the kernel), `dh = dx W`, `dW = dx^T h`. The gradient of a
cross-entropy is known as soon as its logits are, so both are taken while the chunk's logits exist (as Liger Kernel's
fused linear cross-entropy does); what is left for the backward pass is a multiplication.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels.linear_cross_entropy.reference import ChunkLoss, Terms


class Sums(NamedTuple):
    """Over all trained tokens, nothing scaled."""

    loss: Float[Array, ""]
    correct: Int[Array, ""]
    dh: Float[Array, "M D"] | None  # in hidden's dtype
    dw: Float[Array, "V D"] | None  # float32


def _dot(a, b, contract):
    # fp32 inputs are a request for exact arithmetic; without this a GPU multiplies them in TF32.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def sum_chunks(
    hidden: Float[Array, "M D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "M"],
    terms: Terms,
    *,
    chunk_loss: Callable[..., ChunkLoss],
    chunk_size: int,
    with_grads: bool,
    train_weight: bool,
    with_accuracy: bool,
) -> Sums:
    """One pass over ceil(trained tokens / chunk_size) chunks: tokens without a label cost nothing.

    A chunk is one GEMM for the logits, and with `with_grads` one for dh and with `train_weight` one for dW.
    """
    # Why the GEMM writes its logits in fp32 although a bf16 write is half the bytes: a logit between 8 and 16 has a
    # bf16 step of 1/16. At logits of standard deviation 4 (V = 32000) that put the loss of a token off by 0.021 rms
    # against 3e-7, the mean loss by 0.003, and dh by 0.7% against 0.12%. The price for V = 128256 and a chunk of 2048
    # is 0.5 GB in a write and in each read, 0.12 ms each on an H200, next to 6.6 ms for the chunk's two GEMMs.
    tokens, width = hidden.shape
    chunk = min(chunk_size, tokens)
    chunks = -(-tokens // chunk)
    head = weight.astype(hidden.dtype)
    trained = jnp.pad(labels != terms.ignore_index, (0, chunks * chunk - tokens))
    order = jnp.argsort(~trained, stable=True)  # trained tokens first; indices >= M are the tail's, and point nowhere

    def add_chunk(i, sums: Sums) -> Sums:
        rows = lax.dynamic_slice(order, (i * chunk,), (chunk,))
        h = jnp.take(hidden, rows, axis=0, mode="fill", fill_value=0, unique_indices=True)
        y = jnp.take(labels, rows, mode="fill", fill_value=terms.ignore_index, unique_indices=True)
        x = _dot(h, head, ((1,), (1,)))
        dtype = hidden.dtype if with_grads else None
        out = chunk_loss(x, y, terms, gradient_dtype=dtype, with_accuracy=with_accuracy)
        has_label = y != terms.ignore_index
        loss = sums.loss + jnp.sum(jnp.where(has_label, out.loss, 0.0))
        correct, dh, dw = sums.correct, sums.dh, sums.dw
        if with_accuracy:
            correct += jnp.sum(out.correct & has_label, dtype=jnp.int32)
        if with_grads:
            chunk_dh = _dot(out.gradient, head, ((1,), (0,)))
            if out.factor is not None:
                chunk_dh *= out.factor[:, None]
            dh = dh.at[rows].set(chunk_dh.astype(dh.dtype), mode="drop", unique_indices=True)
            if train_weight:
                if out.factor is not None:
                    h = (h.astype(jnp.float32) * out.factor[:, None]).astype(h.dtype)
                dw += _dot(out.gradient, h, ((0,), (0,)))
        return Sums(loss, correct, dh, dw)

    start = Sums(
        jnp.zeros((), jnp.float32),
        jnp.zeros((), jnp.int32),
        jnp.zeros((tokens, width), hidden.dtype) if with_grads else None,
        jnp.zeros((weight.shape[0], width), jnp.float32) if with_grads and train_weight else None,
    )
    return lax.fori_loop(0, (jnp.sum(trained) + chunk - 1) // chunk, add_chunk, start)
