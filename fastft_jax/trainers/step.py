"""The compiled step: loss and gradients of what is trained, one optimizer update, nothing else."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from fastft_jax.models.decoder import Decoder
from fastft_jax.models.remat import Policy
from fastft_jax.models.router import load_balancing_loss
from fastft_jax.pallas_kernels.linear_cross_entropy import linear_cross_entropy

Batch = dict[str, Int[Array, "..."]]  # input_ids, labels, positions, segment_ids; [B, T], or [k, B, T] in a train step

IGNORED = -100


class LossOptions(NamedTuple):
    """What the loss needs to know besides the arrays; all of it fixes the compiled program."""

    policy: str | Policy
    chunk_size: int
    max_segments: int | None  # None: one document a row, right-padded, so that causality alone hides the padding
    max_document_length: int | None = None


def token_loss(
    decoder: Decoder, batch: Batch, options: LossOptions, dropout_key: Array | None = None, with_accuracy: bool = False
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed cross-entropy of the labelled tokens, in nats, and how many of them argmax predicts (if asked).

    batch arrays are [B, T]; labels are already shifted: labels[t] is what position t should predict, -100 nothing.
    """
    return _losses(decoder, batch, options, dropout_key, with_accuracy)[0]


def _losses(
    decoder: Decoder, batch: Batch, options: LossOptions, dropout_key: Array | None = None, with_accuracy: bool = False
) -> tuple[tuple[Float[Array, ""], Int[Array, ""]], Float[Array, ""] | float]:
    """`token_loss`, and the load-balancing loss of the routers times its coefficient: 0 where the model has it off."""
    experts = decoder.config.experts
    balanced = experts is not None and experts.aux_loss_coef is not None
    hidden, load = decoder.hidden_states_and_load(
        batch["input_ids"],
        batch["positions"],
        None if options.max_segments is None else batch["segment_ids"],
        batch["segment_ids"] > 0 if balanced else None,
        max_segments=options.max_segments,
        max_document_length=options.max_document_length,
        policy=options.policy,
        dropout_key=dropout_key,
    )
    head_key = None if dropout_key is None else jax.random.fold_in(dropout_key, decoder.config.num_hidden_layers)
    losses = linear_cross_entropy(
        *decoder.head_product(hidden.reshape(-1, hidden.shape[-1]), head_key),
        batch["labels"].reshape(-1),
        chunk_size=options.chunk_size,
        train_weight=decoder.trains_head,
        with_accuracy=with_accuracy,
        softcap=decoder.config.final_softcap,
        logit_scale=decoder.config.logit_scale,
    )
    if load is None:
        return losses, 0.0
    rows = jnp.sum(batch["segment_ids"] > 0) * sum(kind.sparse for kind in decoder.config.layer_kinds)
    return losses, experts.aux_loss_coef * load_balancing_loss(load, rows)


def gradients(
    definition: nnx.GraphDef,
    trainable: nnx.State,
    frozen: nnx.State,
    batch: Batch,
    options: LossOptions,
    key: Array | None,
) -> tuple[Float[Array, ""], nnx.State]:
    """Mean loss over the labelled tokens of all k micro-batches [k, B, T], and its gradient for `trainable`.

    Each micro-batch contributes its sum divided by the count of all of them, so k micro-batches equal one batch of k
    times the rows. The routers' load-balancing loss, where the model's config.json turns it on, is not linear in the
    rows: the mean of the micro-batches' own is added.
    """
    count = jnp.maximum(jnp.sum(batch["labels"] != IGNORED), 1)
    steps = batch["labels"].shape[0]
    keys = None if key is None else jax.random.split(key, steps)

    def loss(trainable, micro, micro_key):
        decoder = nnx.merge(definition, trainable, frozen)
        (summed, _), balance = _losses(decoder, micro, options, micro_key)
        return summed / count + balance / steps

    def add(total, xs):
        micro, micro_key = xs
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(trainable, micro, micro_key)), None

    if steps == 1:
        return jax.value_and_grad(loss)(trainable, *jax.tree.map(lambda x: x[0], (batch, keys)))
    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
    return jax.lax.scan(add, zero, (batch, keys))[0]


def make_train_step(
    definition: nnx.GraphDef, optimizer: optax.GradientTransformation, options: LossOptions
) -> Callable:
    """`step(trainable, opt_state, frozen, batch, key) -> (trainable, opt_state, metrics)`, to be jitted.

    A step whose loss or gradient is not finite changes nothing, so that the state is still good when the run stops.
    """

    def step(trainable, opt_state, frozen, batch, key):
        loss, grads = gradients(definition, trainable, frozen, batch, options, key)
        norm = optax.tree.norm(grads)
        updates, new_state = optimizer.update(grads, opt_state, trainable)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        trainable, opt_state = jax.tree.map(
            keep, (optax.apply_updates(trainable, updates), new_state), (trainable, opt_state)
        )
        return trainable, opt_state, {"loss": loss, "grad_norm": norm, "finite": finite}

    return step


def make_eval_step(definition: nnx.GraphDef, options: LossOptions) -> Callable:
    """`step(trainable, frozen, batch) -> {loss_sum, tokens, correct}` of one batch [B, T], to be jitted."""

    def step(trainable, frozen, batch):
        decoder = nnx.merge(definition, trainable, frozen)
        loss_sum, correct = token_loss(decoder, batch, options, with_accuracy=True)
        return {"loss_sum": loss_sum, "tokens": jnp.sum(batch["labels"] != IGNORED), "correct": correct}

    return step
