"""The second half of a gated feed-forward layer as one op: the gated activation, then the down projection with LoRA.

y = act W^T + s (act A^T) B^T with act = f(gate) * up. One op and not two, because the backward pass then computes the
activation again, for dA, in the same pass over gate and up that computes their gradients, and because the kernels can
read gate and up where the training loop stored them.
"""

import functools

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels.glu import Activation, glu, glu_backward
from fastft_jax.quant.keep import Keep
from fastft_jax.quant.lora_linear import (
    Projection,
    adapter_gradients,
    inner_product,
    input_gradient,
    room_of,
    wide_product,
)


def glu_linear(
    gate_up: Float[Array, "... 2F"],
    projection: Projection,
    scaling: float,
    *,
    activation: Activation = "silu",
    stack: Float[Array, "L ... 2F"] | None = None,
    index: Int[Array, ""] | None = None,
    keep: Keep | None = None,
) -> Float[Array, "... D"]:
    """`lora_linear(glu(gate_up), [projection])`, values and gradients alike; the weight is frozen.

    With `stack`, gate_up is read from `stack[index]` and `gate_up` itself only receives the gradient. What is computed
    again anyway, the activation, gives the adapter's inner product again where `keep` does not keep it.
    """
    lead = gate_up.shape[:-1]
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    if stack is not None:
        stack = stack.reshape(stack.shape[0], *rows.shape)
    room = room_of([projection])
    h = None
    if room and keep is not None and keep.keeps("lora_h"):
        source = lax.stop_gradient(rows) if stack is None else stack
        act = glu(source, activation=activation, room=room, index=index)
        h = keep("lora_h", inner_product(act, lax.stop_gradient((projection,))))
    y = _glu_linear(rows, stack, index, h, projection, scaling, activation)
    return y.reshape(*lead, y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _glu_linear(gate_up, stack, index, h, projection, scaling, activation):
    source = gate_up if stack is None else stack
    act = glu(source, activation=activation, room=room_of([projection]), index=index)
    return wide_product(act, _inner(act, projection) if h is None else h, (projection,), (scaling,))


def _forward(gate_up, stack, index, h, projection, scaling, activation):
    y = _glu_linear(gate_up, stack, index, h, projection, scaling, activation)
    return y, (gate_up if stack is None else None, stack, index, h, projection)


def _backward(scaling, activation, residuals, dy):
    gate_up, stack, index, h, projection = residuals
    d_act, dh = input_gradient(dy, (projection,), (scaling,))
    source = gate_up if stack is None else stack
    d_gate_up, act = glu_backward(source, d_act, activation=activation, index=index)
    h = _inner(act, projection) if h is None else h
    (gradient,) = adapter_gradients(act, h, dh, dy, (projection,), (scaling,))
    return d_gate_up, None, None, None, gradient


def _inner(act, projection) -> Float[Array, "M room"] | None:
    return inner_product(act, (projection,)) if room_of([projection]) else None


_glu_linear.defvjp(_forward, _backward)
