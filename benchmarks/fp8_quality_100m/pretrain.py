"""A Llama trained from random weights on a corpus, all of it, in bfloat16 with float32 masters.

The product freezes its base, so the forward pass that trains one is scripts/trainable_llama.py. The held-out loss is
that of the product's decoder with the same weights: where the two forwards did not agree, the training loss and it
would part.
"""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.decoder import Decoder
from fastft_jax.pallas_kernels.linear_cross_entropy import default_chunk_size, linear_cross_entropy
from fastft_jax.trainers.optim import make_optimizer
from fastft_jax.trainers.step import LossOptions, token_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from trainable_llama import Weights, hidden_states, weight_requests  # noqa: E402

DTYPE = jnp.bfloat16
HELD_OUT = 32  # one row in so many is held out
CHECKS, CHECKED_BATCHES = 8, 8


class Pretraining(NamedTuple):
    """Rows of `length` tokens, `rows` a step, `epochs` times over the corpus (no more than `max_steps`)."""

    rows: int
    length: int
    epochs: int
    learning_rate: float
    warmup_steps: int
    max_steps: int | None = None


def pretrain(config: DecoderConfig, corpus: np.ndarray, plan: Pretraining, seed: int = 0) -> tuple[Weights, dict]:
    """The weights with the lowest held-out loss, float32, and a record of how they came about."""
    train, held_out = _rows(corpus, plan.length)
    batches = min(len(held_out) // plan.rows, CHECKED_BATCHES)
    held_out = jnp.asarray(held_out[: batches * plan.rows].reshape(batches, plan.rows, plan.length + 1))
    per_epoch = len(train) // plan.rows
    steps = min(per_epoch * plan.epochs, plan.max_steps or 10**9)
    optimizer, _ = make_optimizer(
        learning_rate=plan.learning_rate,
        total_steps=steps,
        warmup_steps=plan.warmup_steps,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.95,
    )
    weights = random_weights(config, seed)
    start = time.perf_counter()
    state = jax.jit(optimizer.init)(weights)
    batch = jnp.zeros((plan.rows, plan.length + 1), jnp.int32)
    step = _train_step(config, optimizer).lower(weights, state, batch).compile()
    loss_of = jax.jit(lambda w, rows: jnp.mean(jax.lax.map(lambda ids: decoder_loss(config, w, ids), rows)))
    compile_seconds = time.perf_counter() - start

    losses, checks, best = [], [], None
    checked = set(np.linspace(0, steps, CHECKS + 1).round().astype(int)[1:].tolist())
    start = time.perf_counter()
    for number in range(steps):
        epoch, index = divmod(number, per_epoch)
        if index == 0:
            order = np.random.default_rng([seed, epoch]).permutation(len(train))
        ids = jnp.asarray(train[order[index * plan.rows : (index + 1) * plan.rows]])
        weights, state, loss = step(weights, state, ids)
        losses.append(loss)
        if number + 1 in checked:
            checks.append([number + 1, round(float(loss_of(weights, held_out)), 4)])
            print(
                f"pretraining step {number + 1} of {steps}: loss {float(loss):.3f}, held out {checks[-1][1]}",
                flush=True,
            )
            if checks[-1][1] <= min(value for _, value in checks):
                best = jax.tree.map(jnp.copy, weights)
    seconds = time.perf_counter() - start
    record = {
        "parameters": sum(w.size for w in weights.values()),
        "steps": steps,
        "tokens_a_step": plan.rows * plan.length,
        "epochs": round(steps / per_epoch, 2),
        "learning_rate": plan.learning_rate,
        "train_losses": means(losses),
        "held_out_losses": checks,
        "compile_seconds": round(compile_seconds, 1),
        "seconds": round(seconds, 1),
    }
    return best, record


def random_weights(config: DecoderConfig, seed: int) -> Weights:
    """normal(0, 0.02), smaller by sqrt(2 L) for what writes to the residual stream; norms 1."""
    rng, weights = np.random.default_rng(seed), {}
    for path, shape, layers in tensor_requests_of(config):
        shape = shape if layers is None else (len(layers), *shape)
        scale = 0.02
        if path.endswith(("o_proj.weight", "down_proj.weight")):
            scale /= (2 * config.num_hidden_layers) ** 0.5
        norm = path.endswith("norm.weight")
        weights[path] = jnp.ones(shape) if norm else jnp.asarray(rng.standard_normal(shape, np.float32) * scale)
    return weights


def tensor_requests_of(config: DecoderConfig) -> list[tuple[str, tuple[int, ...], tuple[int, ...] | None]]:
    """(path, shape of one, layers) of every weight."""
    return [(request.path, request.shape, request.layers) for request in weight_requests(config)]


def decoder_loss(config: DecoderConfig, weights: Weights, ids: Int[Array, "B T+1"]) -> Float[Array, ""]:
    """Mean loss of the product's decoder with these weights, unquantised."""
    decoder = Decoder(config, lambda path, shape, layers: weights[path].astype(DTYPE), DTYPE)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "positions": _positions(ids)}
    options = LossOptions("none", default_chunk_size(config.vocab_size), None)
    return token_loss(decoder, batch, options)[0] / batch["labels"].size


def training_loss(config: DecoderConfig, weights: Weights, ids: Int[Array, "B T+1"]) -> Float[Array, ""]:
    """The same, differentiable in every weight."""
    hidden = hidden_states(config, weights, ids[:, :-1], DTYPE).reshape(-1, config.hidden_size)
    labels = ids[:, 1:].reshape(-1)
    chunk = default_chunk_size(config.vocab_size)
    total, _ = linear_cross_entropy(hidden, weights["embed_tokens.weight"], labels, chunk_size=chunk, train_weight=True)
    return total / labels.size


def means(losses: list[Any], window: int = 10) -> list[list[float]]:
    """[last step, mean loss] of every `window` steps."""
    values = np.array(jax.device_get(losses), np.float64)
    parts = [values[i : i + window] for i in range(0, len(values), window)]
    return [[min((i + 1) * window, len(values)), round(float(part.mean()), 4)] for i, part in enumerate(parts)]


def _train_step(config: DecoderConfig, optimizer: optax.GradientTransformation):
    def step(weights, state, ids):
        loss, gradient = jax.value_and_grad(lambda w: training_loss(config, w, ids))(weights)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def _rows(corpus: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of length + 1 tokens to train on, and those held out."""
    rows = corpus[: len(corpus) // (length + 1) * (length + 1)].reshape(-1, length + 1).astype(np.int32)
    held_out = np.arange(len(rows)) % HELD_OUT == 0
    return rows[~held_out], rows[held_out]


def _positions(ids: Int[Array, "B T+1"]) -> Int[Array, "B T"]:
    return jnp.broadcast_to(jnp.arange(ids.shape[1] - 1), (ids.shape[0], ids.shape[1] - 1))
