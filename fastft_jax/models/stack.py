"""The loop over a segment's layers and its derivative, both written out.

A layer gives its output and, where something is summed over layers (a router's load), what it adds to that sum.

The forward loop stores what the remat policy keeps of each layer; the backward loop traces the layer again, with the
kept values read back (`residuals.py`), and pulls the cotangent through it. A policy that treats the last layers
otherwise makes two loops of each. Against differentiating `lax.scan` under `jax.checkpoint` this spares, on a GPU, a
zero-fill of every buffer, copies of quantised weights and of large kept values, and the wait for what lies on the host:
that is fetched one layer ahead of its use.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastft_jax.models.remat import LAYER_INPUT, Part, Policy, parts
from fastft_jax.models.residuals import Buffers, Keep, Probe, Reader, Writer, fetch

# layer(x, trainable, frozen, index, keep) -> x, addend; trainable: this layer's leaves; frozen: what `index` selects
# from; addend: any pytree of arrays
LayerFn = Callable[[Float[Array, "B T D"], Any, Any, Array, Keep], tuple[Float[Array, "B T D"], Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def run_layers(
    layer: LayerFn, count: int, policy: str | Policy, x: Float[Array, "B T D"], trainable: Any, frozen: Any
) -> tuple[Float[Array, "B T D"], Any]:
    """x after layers 0..count-1, and the sum of their addends.

    `trainable` leaves are stacked [L, ...] and differentiable, as x is; `frozen` is not. Memory between the loops is
    `policy`'s: layer inputs always, and the names it saves or offloads.
    """

    def run(x, index):
        return layer(x, _at(trainable, index), frozen, index, Keep())

    def body(index, carry):
        x, total = carry
        x, addend = run(x, index)
        return x, _add(total, addend)

    return lax.fori_loop(0, count, body, (x, _zeros(jax.eval_shape(run, x, 0)[1])))


def _forward(layer, count, policy, x, trainable, frozen):
    kept, totals = [], []
    for part in parts(policy, count):
        on_host = sum(len(buffers.host) for buffers in kept)
        x, total, buffers = _forward_part(layer, part, x, trainable, frozen, on_host)
        kept.append(buffers)
        totals.append(total)
    return (x, functools.reduce(_add, totals)), (kept, trainable, frozen)


def _forward_part(layer: LayerFn, part: Part, x, trainable, frozen, on_host: int) -> tuple[Array, Any, Buffers]:
    """x after the layers of `part`, the sum of their addends, and what they keep; earlier parts have `on_host` buffers
    on the host."""

    def run(x, index, keep):
        return layer(keep(LAYER_INPUT, x), _at(trainable, index), frozen, index, keep)

    probe = Probe(part.table)
    _, addend = jax.eval_shape(lambda x: run(x, jnp.int32(0), probe), x)

    def body(index, carry):
        x, total, buffers = carry
        keep = Writer(part.table, buffers, index - part.start)
        x, addend = run(x, index, keep)
        return x, _add(total, addend), keep.buffers

    buffers = probe.buffers(part.stop - part.start, on_host)
    return lax.fori_loop(part.start, part.stop, body, (x, _zeros(addend), buffers))


def _backward(layer, count, policy, residuals, cotangents):
    kept, trainable, frozen = residuals
    dy, d_total = cotangents
    gradients = jax.tree.map(jnp.zeros_like, trainable)
    for part, buffers in reversed(list(zip(parts(policy, count), kept, strict=True))):
        dy, gradients = _backward_part(layer, part, buffers, dy, d_total, gradients, trainable, frozen)
    return dy, gradients, None


def _backward_part(
    layer: LayerFn, part: Part, buffers: Buffers, dy, d_total, gradients, trainable, frozen
) -> tuple[Array, Any]:
    """The cotangent of what entered `part`, and the gradients with its layers' written in their places."""
    count = part.stop - part.start

    def body(turn, carry):
        dy, gradients, fetched = carry
        here = count - 1 - turn
        index = part.start + here
        coming = fetch(buffers, here - 1)  # for the next turn; the last one fetches slice 0, clamped, for nothing
        keep = Reader(part.table, buffers, fetched, here)
        run = lambda x, leaves: layer(x, leaves, frozen, index, keep)  # noqa: E731
        _, pull_back = jax.vjp(run, keep.stored(f"{LAYER_INPUT}/0"), _at(trainable, index))
        dx, d_leaves = pull_back((dy, d_total))
        put = lambda buffer, leaf: lax.dynamic_update_index_in_dim(buffer, leaf, index, 0)  # noqa: E731
        return dx, jax.tree.map(put, gradients, d_leaves), coming

    dx, gradients, _ = lax.fori_loop(0, count, body, (dy, gradients, fetch(buffers, count - 1)))
    return dx, gradients


run_layers.defvjp(_forward, _backward)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _at(leaves: Any, index: Array) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), leaves)
