"""Sizes that the loss is compiled and timed on: Llama-3's head in one chunk, and whole, with and without prompts."""

import functools

import jax
import jax.numpy as jnp

from fastft_jax.pallas_kernels.case import Case
from fastft_jax.pallas_kernels.linear_cross_entropy import chunks, reference, triton
from fastft_jax.pallas_kernels.linear_cross_entropy.reference import IGNORE_INDEX, Terms

TERMS = {"": Terms(), "_softcap": Terms(softcap=30.0), "_smooth": Terms(label_smoothing=0.1, z_loss=1e-4)}


def _labels(key, tokens: int, vocab: int, trained: float = 1.0):
    draw, keep = jax.random.split(key)
    labels = jax.random.randint(draw, (tokens,), 0, vocab, jnp.int32)
    return jnp.where(jax.random.uniform(keep, (tokens,)) < trained, labels, IGNORE_INDEX)


def _kernel_reference(x, labels, terms: Terms, gradient_dtype):
    """What the kernel writes: where it factors a row, exp(z - guess) and not the softmax."""
    out = reference.chunk_loss(x, labels, terms, gradient_dtype=jnp.float32, with_accuracy=False)
    if gradient_dtype is None:
        return (out.loss,)
    if terms.label_smoothing or terms.z_loss:
        return out.loss, out.gradient.astype(gradient_dtype)
    z, _ = reference.logits_and_slope(x, terms)
    guess = jnp.max(z[:, : triton.TILE], axis=1)
    factor = jnp.exp(guess - jax.nn.logsumexp(z, axis=1)) * terms.logit_scale
    return out.loss, (out.gradient / factor[:, None]).astype(gradient_dtype), factor


def _kernel_case(tokens: int, vocab: int, direction: str) -> Case:
    terms = TERMS[direction.removeprefix("loss").removeprefix("gradient")]
    dtype = jnp.bfloat16 if direction.startswith("gradient") else None

    def run(x, labels, interpret=None):
        out = triton.chunk_loss(
            x, labels, terms, gradient_dtype=dtype, with_accuracy=dtype is None, interpret=interpret
        )
        return tuple(v for v in (out.loss, out.gradient, out.factor) if v is not None)

    def draw(seed: int):
        logits, labels = jax.random.split(jax.random.key(seed))
        return 4 * jax.random.normal(logits, (tokens, vocab), jnp.float32), _labels(labels, tokens, vocab)

    return Case(
        name=f"linear_cross_entropy/{direction}/{tokens}x{vocab}",
        run=run,
        reference=functools.partial(_kernel_reference, terms=terms, gradient_dtype=dtype),
        args=(jax.ShapeDtypeStruct((tokens, vocab), jnp.float32), jax.ShapeDtypeStruct((tokens,), jnp.int32)),
        bytes=tokens * vocab * (4 if dtype is None else 6),
        draw=draw,
    )


def _loss_and_gradient(hidden, weight, labels, *, chunk_size: int, chunk_loss, interpret: bool | None = None):
    """Loss and dh of the training step with a frozen head."""
    sums = chunks.sum_chunks(
        hidden,
        weight,
        labels,
        Terms(),
        chunk_loss=functools.partial(chunk_loss, interpret=interpret)
        if chunk_loss is triton.chunk_loss
        else chunk_loss,
        chunk_size=chunk_size,
        with_grads=True,
        train_weight=False,
        with_accuracy=False,
    )
    return sums.loss, sums.dh


def _whole_case(tokens: int, width: int, vocab: int, chunk_size: int, trained: float = 1.0) -> Case:
    shapes = ((tokens, width), (vocab, width))

    def draw(seed: int):
        hidden, weight, labels = jax.random.split(jax.random.key(seed), 3)
        return (
            jax.random.normal(hidden, shapes[0], jnp.bfloat16),
            jax.random.normal(weight, shapes[1], jnp.bfloat16) * jnp.bfloat16(4 * width**-0.5),
            _labels(labels, tokens, vocab, trained),
        )

    masked = "" if trained == 1 else f"_trained{trained:.0%}"
    return Case(
        name=f"linear_cross_entropy/loss_and_gradient{masked}/{tokens}x{width}x{vocab}/chunk{chunk_size}",
        run=functools.partial(_loss_and_gradient, chunk_size=chunk_size, chunk_loss=triton.chunk_loss),
        reference=functools.partial(_loss_and_gradient, chunk_size=chunk_size, chunk_loss=reference.chunk_loss),
        args=(
            *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes),
            jax.ShapeDtypeStruct((tokens,), jnp.int32),
        ),
        bytes=2 * (2 * tokens + vocab) * width,
        flops=int(4 * trained * tokens * width * vocab),
        draw=draw,
    )


CASES: tuple[Case, ...] = (
    _kernel_case(2048, 128256, "loss"),
    _kernel_case(2048, 128256, "gradient"),
    _kernel_case(1000, 50257, "gradient"),
    _kernel_case(2048, 256000, "gradient_softcap"),
    _kernel_case(2048, 128256, "gradient_smooth"),
    _whole_case(8192, 4096, 128256, 2048),
    _whole_case(8192, 4096, 128256, 1024),
    _whole_case(8192, 4096, 128256, 512),  # the lean mode
    _whole_case(8192, 4096, 128256, 2048, trained=0.25),
    _whole_case(1000, 3584, 152064, 1024),
)
