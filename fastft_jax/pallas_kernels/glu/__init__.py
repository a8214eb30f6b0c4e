"""Gated linear units: the activation half of a gated feed-forward layer."""

import functools
from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.glu import reference
from fastft_jax.pallas_kernels.glu.reference import ACTIVATIONS, Activation

Implementation = Literal["xla", "triton"]

__all__ = ["Activation", "Implementation", "glu", "glu_backward"]


def glu(
    gate_up: Float[Array, "*B 2F"],
    *,
    activation: Activation = "silu",
    room: int = 0,
    index: Int[Array, ""] | None = None,
    row_weight: Float[Array, "*B"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*B F+room"]:
    """`act(gate) * up` of a fused projection `[gate | up]`, in its dtype.

    The activation is float32 and rounded to the input dtype before the product, as transformers does: "silu",
    "gelu_tanh" (its gelu_pytorch_tanh) or "gelu" (exact: the kernel's erf is within 2e-7). "clamped_silu" is GPT-OSS's
    whole unit: with gate cut at 7 and up at -7 and 7, `gate sigmoid(1.702 gate) (up + 1)`. `room` appends that many
    columns of zeros, so that a caller can write a LoRA product there and feed one GEMM; their cotangent is ignored.
    `row_weight`, float32, multiplies the rounded result row by row, with one more rounding: a router's.
    With `index`, gate_up is a stack [L, ..., 2F], of which that one is read where it lies, and there is no gradient.
    Only its operands are kept for the gradient, which one pass computes. `implementation` None picks "triton" on a GPU,
    "xla" elsewhere. Raises ValueError for shapes and names that do not fit. Source: Shazeer 2020, arXiv:2002.05202.
    """
    implementation = _check(gate_up, activation, room, implementation)
    if index is not None:
        gate_up, index = _in_place(gate_up, index, implementation)
        return _kernels(implementation).forward(
            gate_up, activation=activation, room=room, index=index, row_weight=row_weight
        )
    return _glu(gate_up, row_weight, activation, room, implementation)


def glu_backward(
    gate_up: Float[Array, "*B 2F"],
    d_act: Float[Array, "*B F+any"],
    *,
    activation: Activation = "silu",
    room: int = 0,
    index: Int[Array, ""] | None = None,
    row_weight: Float[Array, "*B"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, ...]:
    """The cotangent of gate_up [*B, 2F], `glu(gate_up, room=room, row_weight=row_weight)` again, and the cotangent of
    row_weight [*B], float32, if there is one, from one pass: for another op's backward.

    `d_gate = d_act * up * act'(gate)` and `d_up = d_act * act(gate)`, in float32 with one cast, where row_weight times
    d_act stands for d_act. Columns of d_act beyond F are ignored; `index` as for `glu`. Results take the operands'
    places where nothing else reads those. Raises ValueError as `glu` does.
    """
    implementation = _check(gate_up, activation, room, implementation)
    lead = gate_up.shape[:-1] if index is None else gate_up.shape[1:-1]
    if d_act.shape[:-1] != lead or d_act.shape[-1] < gate_up.shape[-1] // 2:
        raise ValueError(f"d_act {d_act.shape} does not fit gate_up {gate_up.shape}")
    gate_up, index = _in_place(gate_up, index, implementation)
    options = dict(activation=activation, room=room, with_act=True, index=index, row_weight=row_weight)
    if implementation == "triton":
        options["in_place"] = True
    return _kernels(implementation).backward(gate_up, d_act, **options)


def _in_place(gate_up, index, implementation) -> tuple[Array, Array | None]:
    """Only the kernel reads a stack; XLA fuses a slice into what reads it."""
    if index is None or implementation == "triton":
        return gate_up, index
    return jax.lax.dynamic_index_in_dim(gate_up, index, keepdims=False), None


def _check(gate_up, activation, room, implementation) -> Implementation:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")
    if implementation not in (None, "xla", "triton"):
        raise ValueError(f"unknown GLU implementation {implementation!r}: use None, 'xla' or 'triton'")
    if gate_up.ndim < 1 or gate_up.shape[-1] % 2 or room < 0:
        raise ValueError(f"gate_up must be [..., 2F] and room at least 0, got {gate_up.shape} and {room}")
    return implementation or ("triton" if pallas.on_gpu() else "xla")


def _kernels(implementation: Implementation):
    if implementation == "xla":
        return reference
    from fastft_jax.pallas_kernels.glu import triton

    return triton


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _glu(gate_up, row_weight, activation, room, implementation):
    return _kernels(implementation).forward(gate_up, activation=activation, room=room, row_weight=row_weight)


def _forward(gate_up, row_weight, activation, room, implementation):
    return _glu(gate_up, row_weight, activation, room, implementation), (gate_up, row_weight)


def _backward(activation, room, implementation, residuals, d_act):
    gate_up, row_weight = residuals
    options = dict(activation=activation, room=0, with_act=False, row_weight=row_weight)
    d_gate_up, _, *d_weight = _kernels(implementation).backward(gate_up, d_act, **options)
    return d_gate_up, *(d_weight or [None])


_glu.defvjp(_forward, _backward)
