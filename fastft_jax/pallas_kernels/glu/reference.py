"""Gated linear units in plain jnp."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels.glu.activations import CLAMP_ALPHA, CLAMP_LIMIT, linear_half
from fastft_jax.pallas_kernels.rms_norm.reference import with_room

Activation = Literal["silu", "gelu_tanh", "gelu", "clamped_silu"]


def _clamped_silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    x = jnp.where(x >= CLAMP_LIMIT, CLAMP_LIMIT, x)  # at the limit itself the slope is 0, as in torch
    return x * jax.nn.sigmoid(CLAMP_ALPHA * x)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "clamped_silu": _clamped_silu,
}
"""Those of transformers's ACT2FN: gelu_tanh is its gelu_pytorch_tanh, gelu the exact one; and GPT-OSS's."""


def forward(
    gate_up: Float[Array, "*B 2F"],
    *,
    activation: Activation,
    room: int,
    index: None = None,
    row_weight: Float[Array, "*B"] | None = None,
) -> Float[Array, "*B F+room"]:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    act = ACTIVATIONS[activation](gate.astype(jnp.float32)).astype(gate.dtype)
    return with_room(_weighted(act * linear_half(activation, up)[0], row_weight), room)


def backward(
    gate_up: Float[Array, "*B 2F"],
    d_act: Float[Array, "*B F+room"],
    *,
    activation: Activation,
    room: int,
    with_act: bool,
    index: None = None,
    row_weight: Float[Array, "*B"] | None = None,
) -> tuple[Array | None, ...]:
    """d_gate = d up act'(gate), d_up = d act(gate), in float32, and the forward's result if `with_act`; with the
    derivative of what `linear_half` makes of up. With `row_weight`, that times d, and its own gradient as a third."""
    f = gate_up.shape[-1] // 2
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    d = d_act[..., :f].astype(jnp.float32)
    act, pull = jax.vjp(ACTIVATIONS[activation], gate)
    act = act.astype(gate_up.dtype)
    up, up_slope = linear_half(activation, up)
    y = act * up.astype(act.dtype)
    d_weight = ()
    if row_weight is not None:
        d_weight = (jnp.sum(d * y.astype(jnp.float32), axis=-1),)
        d = d * row_weight[..., None]
    d_gate_up = jnp.concatenate([*pull(d * up), d * act.astype(jnp.float32) * up_slope], axis=-1).astype(gate_up.dtype)
    return d_gate_up, with_room(_weighted(y, row_weight), room) if with_act else None, *d_weight


def _weighted(y: Float[Array, "*B F"], row_weight: Float[Array, "*B"] | None) -> Float[Array, "*B F"]:
    return y if row_weight is None else (y.astype(jnp.float32) * row_weight[..., None]).astype(y.dtype)
