"""The loop over a segment's layers and its derivative, both written out.

The forward loop stores what the remat policy keeps of each layer; the backward loop traces the layer again, with the
kept values read back (`residuals.py`), and pulls the cotangent through it. Against differentiating `lax.scan` under
`jax.checkpoint` this spares, on a GPU, a zero-fill of every buffer, copies of quantised weights and of large kept
values, and the wait for what lies on the host: that is fetched one layer ahead of its use.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastft_jax.models.remat import LAYER_INPUT, Policy, table_of
from fastft_jax.models.residuals import Keep, Probe, Reader, Writer, fetch

# layer(x, trainable, frozen, index, keep) -> x; trainable: this layer's leaves; frozen: what `index` selects from
LayerFn = Callable[[Float[Array, "B T D"], Any, Any, Array, Keep], Float[Array, "B T D"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def run_layers(
    layer: LayerFn, count: int, policy: str | Policy, x: Float[Array, "B T D"], trainable: Any, frozen: Any
) -> Float[Array, "B T D"]:
    """x after layers 0..count-1. `trainable` leaves are stacked [L, ...] and differentiable, as x is; `frozen` is not.

    Memory between the loops is `policy`'s: layer inputs always, and the names it saves or offloads.
    """

    def body(index, x):
        return layer(x, _at(trainable, index), frozen, index, Keep())

    return lax.fori_loop(0, count, body, x)


def _forward(layer, count, policy, x, trainable, frozen):
    table = _table(policy)

    def run(x, index, keep):
        return layer(keep(LAYER_INPUT, x), _at(trainable, index), frozen, index, keep)

    probe = Probe(table)
    jax.eval_shape(lambda x: run(x, jnp.int32(0), probe), x)

    def body(index, carry):
        x, buffers = carry
        keep = Writer(table, buffers, index)
        return run(x, index, keep), keep.buffers

    y, buffers = lax.fori_loop(0, count, body, (x, probe.buffers(count)))
    return y, (buffers, trainable, frozen)


def _backward(layer, count, policy, residuals, dy):
    buffers, trainable, frozen = residuals
    table = _table(policy)

    def body(turn, carry):
        dy, gradients, fetched = carry
        index = count - 1 - turn
        coming = fetch(buffers, index - 1)  # for the next turn; the last one fetches slice 0, clamped, for nothing
        keep = Reader(table, buffers, fetched, index)
        run = lambda x, leaves: layer(x, leaves, frozen, index, keep)  # noqa: E731
        _, pull_back = jax.vjp(run, keep.stored(f"{LAYER_INPUT}/0"), _at(trainable, index))
        dx, d_leaves = pull_back(dy)
        put = lambda buffer, leaf: lax.dynamic_update_index_in_dim(buffer, leaf, index, 0)  # noqa: E731
        return dx, jax.tree.map(put, gradients, d_leaves), coming

    start = (dy, jax.tree.map(jnp.zeros_like, trainable), fetch(buffers, count - 1))
    dx, gradients, _ = lax.fori_loop(0, count, body, start)
    return dx, gradients, None


run_layers.defvjp(_forward, _backward)


def _table(policy: str | Policy) -> dict[str, str]:
    table = {LAYER_INPUT: "save", **table_of(policy)}
    return table | {LAYER_INPUT: "save"} if table[LAYER_INPUT] == "recompute" else table


def _at(leaves: Any, index: Array) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), leaves)
