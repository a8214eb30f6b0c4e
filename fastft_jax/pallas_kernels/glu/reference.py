"""Gated linear units in plain jnp."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels.rms_norm.reference import with_room

Activation = Literal["silu", "gelu_tanh", "gelu"]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
"""Those of transformers's ACT2FN: gelu_tanh is its gelu_pytorch_tanh, gelu the exact one."""


def forward(
    gate_up: Float[Array, "*B 2F"], *, activation: Activation, room: int, index: None = None
) -> Float[Array, "*B F+room"]:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    act = ACTIVATIONS[activation](gate.astype(jnp.float32)).astype(gate.dtype)
    return with_room(act * up, room)


def backward(
    gate_up: Float[Array, "*B 2F"],
    d_act: Float[Array, "*B F+room"],
    *,
    activation: Activation,
    room: int,
    with_act: bool,
    index: None = None,
) -> tuple[Float[Array, "*B 2F"], Float[Array, "*B F+room"] | None]:
    """d_gate = d up act'(gate), d_up = d act(gate), in float32, and the forward's result if `with_act`."""
    f = gate_up.shape[-1] // 2
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    d = d_act[..., :f].astype(jnp.float32)
    act, pull = jax.vjp(ACTIVATIONS[activation], gate)
    act = act.astype(gate_up.dtype)
    d_gate_up = jnp.concatenate([*pull(d * up), d * act.astype(jnp.float32)], axis=-1).astype(gate_up.dtype)
    return d_gate_up, with_room(act * up.astype(act.dtype), room) if with_act else None
