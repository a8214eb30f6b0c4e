"""The second half of E gated feed-forward layers as one op: the gated activation, weighted, then the down projection.

y[m] = act[m] W_e^T + s (act[m] A_e^T) B_e^T with act[m] = weight[m] f(gate[m]) up[m], for rows sorted by expert: what
`glu_linear` is to one layer, for its reasons. The router's weight is in the activation's kernel, so that it costs no
pass of its own, and in front of the product, whose result its gradient then does not need. A frozen bias, weighted as
well, is a column of the product's low-rank pair.
"""

import functools

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels.glu import Activation, glu, glu_backward
from fastft_jax.quant.grouped_lora import adapter_gradients, inner, input_gradient, outputs
from fastft_jax.quant.keep import Keep
from fastft_jax.quant.lora_linear import Projection


def grouped_glu_linear(
    gate_up: Float[Array, "M 2F"],
    weight: Float[Array, "M"],
    sizes: Int[Array, "E"],
    projection: Projection,
    scaling: float,
    *,
    activation: Activation = "silu",
    stack: Float[Array, "L M 2F"] | None = None,
    index: Int[Array, ""] | None = None,
    keep: Keep | None = None,
    bias: Float[Array, "E D"] | None = None,
) -> Float[Array, "M D"]:
    """`grouped_lora_linear(glu(gate_up, row_weight=weight), sizes, [projection])`, values and gradients alike; weight
    is float32. With `bias`, plus `weight[m] bias_e`, both factors in gate_up's dtype; the bias takes no gradient.

    With `stack`, gate_up is read from `stack[index]` and `gate_up` itself only receives the gradient.
    """
    h = None
    if projection.a is not None and keep is not None and keep.keeps("lora_h"):
        source = gate_up if stack is None else stack
        source, weight_, projection_ = lax.stop_gradient((source, weight, projection))
        act = glu(source, activation=activation, index=index, row_weight=weight_)
        h = keep("lora_h", inner(act, sizes, (projection_,)))
    return _grouped_glu(gate_up, weight, stack, index, sizes, h, bias, projection, scaling, activation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _grouped_glu(gate_up, weight, stack, index, sizes, h, bias, projection, scaling, activation):
    act = glu(gate_up if stack is None else stack, activation=activation, index=index, row_weight=weight)
    h = inner(act, sizes, (projection,)) if h is None else h
    return outputs(act, h, sizes, (projection,), (scaling,), bias, weight)


def _forward(gate_up, weight, stack, index, sizes, h, bias, projection, scaling, activation):
    y = _grouped_glu(gate_up, weight, stack, index, sizes, h, bias, projection, scaling, activation)
    return y, (gate_up if stack is None else None, weight, stack, index, sizes, h, bias, projection)


def _backward(scaling, activation, residuals, dy):
    gate_up, weight, stack, index, sizes, h, bias, projection = residuals
    d_act, dh, d_scale = input_gradient(dy, sizes, (projection,), (scaling,), bias)
    source = gate_up if stack is None else stack
    d_gate_up, act, d_weight = glu_backward(source, d_act, activation=activation, index=index, row_weight=weight)
    d_weight = d_weight if d_scale is None else d_weight + d_scale
    h = inner(act, sizes, (projection,)) if h is None else h
    (gradient,) = adapter_gradients(act, h, dh, dy, sizes, (projection,), (scaling,))
    return d_gate_up, d_weight, None, None, None, None, None, gradient


_grouped_glu.defvjp(_forward, _backward)
