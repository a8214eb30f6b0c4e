"""A whole gated feed-forward layer in fp8 as one op: norm, gate and up, activation, down, each with LoRA.

y = act W_d^T + .. with act = f(gate) * up and [gate | up] = n [W_g; W_u]^T + .., n = rms_norm(x): what `norm_linear`
and `glu_linear` compute one after the other. One op, because what lies between its products is then never finished for
its own sake: the products' bare sums are kept, and the activation's kernels apply scales and adapters on their way.
"""

import functools
from collections.abc import Sequence

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels.fp8 import Scaled, quantise_rows, rescale_glu, rescale_glu_backward, rms_norm_rows
from fastft_jax.pallas_kernels.glu import Activation
from fastft_jax.pallas_kernels.rms_norm import rms_norm_backward
from fastft_jax.quant import fp8
from fastft_jax.quant.keep import Keep
from fastft_jax.quant.lora_linear import (
    Projection,
    adapter_gradients,
    below_each_other,
    block_diagonal,
    contract,
    inner_product,
    input_gradient,
    rank_slices,
    room_of,
)
from fastft_jax.quant.norm_linear import Norm


def fp8_mlp(
    x: Float[Array, "... D"],
    weight: Float[Array, "D"],
    norm: Norm,
    projections: Sequence[Projection],
    scalings: Sequence[float],
    keep: Keep,
    activation: Activation = "silu",
    *,
    stack: Float[Array, "L ... D"] | None = None,
    at: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """The layer's output, and x again for the residual connection, whose gradient joins there.

    projections and scalings are those of gate, up and down, whose weights compute in fp8. Differentiable in x and the
    adapters. The sums of gate and up go through keep.slot("gate_up", ..) and their scales through keep("gate_up", ..),
    the adapters' inner products through keep("lora_h", ..); what else the gradients need is computed again. With
    `stack`, x is also what `stack[at]` holds, and is read there by the backward kernel.
    """
    rows, dtype = x.reshape(-1, x.shape[-1]), x.dtype
    stack = None if stack is None else stack.reshape(stack.shape[0], *rows.shape)
    gate_up, down = tuple(projections[:2]), tuple(projections[2:])
    in_scalings, out_scalings = tuple(scalings[:2]), tuple(scalings[2:])
    frozen_x, frozen_gate_up, frozen_down = lax.stop_gradient((rows, gate_up, down))
    normed, normed8, row_scales = rms_norm_rows(frozen_x, weight, eps=norm.eps, plus_one=norm.plus_one)
    h = _inner_product(normed, frozen_gate_up, keep)
    product = fp8.product_of_rows(normed8, row_scales, [p.weight for p in gate_up], dtype)
    sums, all_sums, index = keep.slot("gate_up", product.sums)
    kept = (sums if all_sums is None else all_sums, keep("gate_up", product.scale), h, index)
    act = rescale_glu(
        _scaled(kept, frozen_gate_up, in_scalings, dtype),
        dtype=dtype,
        activation=activation,
        ranks=_ranks(gate_up),
        index=index,
    )
    act_h = _inner_product(act, frozen_down, keep)
    options = (norm, in_scalings, out_scalings, activation, keep.keeps("lora_h"))
    y, rows = _fp8_mlp(rows, stack, at, weight, kept, quantise_rows(act), act_h, gate_up, down, options)
    return y.reshape(x.shape), rows.reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(9,))
def _fp8_mlp(x, stack, at, weight, kept, act8, act_h, gate_up, down, options):
    """The down projection, and the whole layer's gradients; `kept` and the activation's parts take none."""
    _, _, scalings, _, _ = options
    low_rank = None if act_h is None else (act_h, block_diagonal(down, scalings, x.dtype))
    product = fp8.product_of_rows(*act8, [down[0].weight], x.dtype)
    return fp8.finished(product, low_rank, x.dtype), x


def _forward(x, stack, at, weight, kept, act8, act_h, gate_up, down, options):
    outputs = _fp8_mlp(x, stack, at, weight, kept, act8, act_h, gate_up, down, options)
    source = x if stack is None else stack
    return outputs, (source, at, weight, kept, act_h if options[-1] else None, gate_up, down)


def _backward(options, residuals, cotangents):
    norm, in_scalings, out_scalings, activation, _ = options
    source, at, weight, kept, act_h, gate_up, down = residuals
    (dy, d_residual), dtype = cotangents, source.dtype
    d_act_h, d_act = None, fp8.scaled_gradient(dy, [down[0].weight])
    if room_of(down):
        d_act_h = contract(dy, block_diagonal(down, out_scalings, dtype), 1, 0, dtype)
        d_act = d_act._replace(h=d_act_h, b=below_each_other(down, dtype).T)
    d_gate_up, act = rescale_glu_backward(
        _scaled(kept, gate_up, in_scalings, dtype),
        d_act,
        dtype=dtype,
        activation=activation,
        ranks=_ranks(gate_up) + _ranks(down),
        index=kept[-1],
    )
    if act_h is None and room_of(down):
        act_h = inner_product(act, down)
    d_down = adapter_gradients(act, act_h, d_act_h, dy, down, out_scalings)
    d_normed, dh = input_gradient(d_gate_up, gate_up, in_scalings)
    norm_options = dict(eps=norm.eps, plus_one=norm.plus_one, index=at)
    dx, normed = rms_norm_backward(d_normed, source, weight, d_residual=d_residual, **norm_options)
    d_pairs = adapter_gradients(normed, kept[2], dh, d_gate_up, gate_up, in_scalings)
    return dx, None, None, None, None, None, None, d_pairs, d_down


_fp8_mlp.defvjp(_forward, _backward)


def _inner_product(rows, projections, keep: Keep) -> Float[Array, "M room"] | None:
    """h, zeros in the rest of the room; None without adapters."""
    if not room_of(projections):
        return None
    return keep("lora_h", contract(rows, below_each_other(projections, rows.dtype), 1, 1, rows.dtype))


def _scaled(kept, gate_up, scalings, dtype) -> Scaled:
    sums, scale, h, _ = kept
    return Scaled(sums, scale) if h is None else Scaled(sums, scale, h, block_diagonal(gate_up, scalings, dtype))


def _ranks(projections: Sequence[Projection]) -> tuple[tuple[int, int], ...]:
    """Each one's columns of h."""
    return tuple((at.start, at.stop) for at in rank_slices(projections))
