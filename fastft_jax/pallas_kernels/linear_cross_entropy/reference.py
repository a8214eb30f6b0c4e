"""Loss and gradients of a linear head with softmax cross-entropy, one chunk of tokens at a time, in plain jnp.

With `z = h W^T`: `loss = sum_t logsumexp(z_t) - z_t[y_t]`, `dz = softmax(z) - onehot(y)`, `dh = dz W`, `dW = dz^T h`.
The gradient of a cross-entropy is known as soon as its logits are, so both are taken while the chunk's logits exist
(as Liger Kernel's fused linear cross-entropy does); what is left for the backward pass is a multiplication.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

IGNORE_INDEX = -100


def _dot(a, b, contract, out_dtype=jnp.float32):
    # fp32 inputs are a request for exact arithmetic; without this a GPU multiplies them in TF32.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=out_dtype)


def chunked(hidden, labels, chunk_size: int):
    """hidden [M, D] -> [chunks, chunk, D] and labels [M] -> [chunks, chunk]; the tail is padded with ignored tokens."""
    tokens, width = hidden.shape
    chunk = min(chunk_size, tokens)
    chunks = -(-tokens // chunk)
    tail = chunks * chunk - tokens
    if tail:
        hidden = jnp.pad(hidden, ((0, tail), (0, 0)))
        labels = jnp.pad(labels, (0, tail), constant_values=IGNORE_INDEX)
    return hidden.reshape(chunks, chunk, width), labels.reshape(chunks, chunk)


def scan_chunks(
    hidden: Float[Array, "M D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "M"],
    *,
    chunk_size: int,
    with_grads: bool,
    train_weight: bool,
    with_accuracy: bool,
):
    """(loss fp32 [], correct int32 [], dh [M, D] in hidden's dtype | None, dW fp32 [V, D] | None), nothing scaled.

    One scan; per chunk one GEMM for the logits, and with `with_grads` one for dh and with `train_weight` one for dW.
    """
    # Why the GEMM writes its logits in fp32 although a bf16 write is half the bytes: a logit between 8 and 16 has a
    # bf16 step of 1/16. At logits of standard deviation 4 (V = 32000) that put the loss of a token off by 0.021 rms
    # against 3e-7, the mean loss by 0.003, and dh by 0.7% against 0.12%. The price on an H200 for V = 128256, D = 4096
    # and a chunk of 2048: 0.5 GB more in one write and in each of three reads, 2.1 GB or 0.5 ms at 4.3 TB/s, next to
    # 6.6 ms for the chunk's two GEMMs; that is 2 ms of a 560 ms step of 2 x 4096 tokens.
    tokens, width = hidden.shape
    vocab = weight.shape[0]
    head = weight.astype(hidden.dtype)
    columns = jnp.arange(vocab, dtype=labels.dtype)

    def step(carry, xs):
        loss, correct, dw = carry
        h, y = xs
        z = _dot(h, head, ((1,), (1,)))
        trained = y != IGNORE_INDEX
        peak = jnp.max(z, axis=-1)
        lse = peak + jnp.log(jnp.sum(jnp.exp(z - peak[:, None]), axis=-1))
        # Any other label outside the vocabulary reads NaN (mode "fill"): a wrong label must not pass for a right one.
        index = jnp.where(trained, jnp.where(y < 0, vocab, y), 0)
        target = jnp.take_along_axis(z, index[:, None], axis=-1, mode="fill", fill_value=jnp.nan)[:, 0]
        loss += jnp.sum(jnp.where(trained, lse - target, 0.0))
        if with_accuracy:
            correct += jnp.sum((jnp.argmax(z, axis=-1).astype(y.dtype) == y) & trained, dtype=jnp.int32)
        if not with_grads:
            return (loss, correct, dw), None
        dz = jnp.exp(z - lse[:, None]) - (columns[None, :] == y[:, None])
        dz = jnp.where(trained[:, None], dz, 0.0).astype(hidden.dtype)
        if train_weight:
            dw += _dot(dz, h, ((0,), (0,)))
        return (loss, correct, dw), _dot(dz, head, ((1,), (0,))).astype(hidden.dtype)

    dw = jnp.zeros((vocab, width), jnp.float32) if with_grads and train_weight else None
    start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), dw)
    (loss, correct, dw), dh = lax.scan(step, start, chunked(hidden, labels, chunk_size))
    if dh is not None:
        dh = dh.reshape(-1, width)[:tokens]
    return loss, correct, dh, dw
