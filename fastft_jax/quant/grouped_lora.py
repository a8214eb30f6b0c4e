"""Frozen linear layers of E experts with LoRA's pairs, over rows sorted by expert.

y_i[m] = x[m] W_ie^T + s_i (x[m] A_ie^T) B_ie^T for the rows m of expert e; i = 1..G linears read the same x. As
`lora_linear`, for one matrix an expert: W is quantised (decoded again in the backward pass) or plain, and frozen.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels.grouped_matmul import grouped_matmul, grouped_matmul_transposed, grouped_outer
from fastft_jax.quant import int8
from fastft_jax.quant.int8 import Int8Array
from fastft_jax.quant.lora_linear import Projection, rank_slices
from fastft_jax.quant.nf4 import NF4Array, dequantize_stack


def grouped_lora_linear(
    x: Float[Array, "M K"],
    sizes: Int[Array, "E"],
    projections: Sequence[Projection],
    scalings: Sequence[float],
    keep: Callable[[str, Array], Array] = lambda name, value: value,
) -> Float[Array, "M N"]:
    """The outputs of all projections side by side, [M, N_1 + .. + N_G], in x.dtype; differentiable in x, A and B.

    Each projection has a weight [E, N, K] and, if it is adapted, float32 A [E, R, K] and B [E, N, R]. The first
    sizes[0] rows of x are expert 0's, and so on; the sizes sum to M. dA and dB come out of float32 accumulators.
    """
    projections = tuple(projections)
    h = None
    if any(p.a is not None for p in projections):
        x_, projections_ = lax.stop_gradient((x, projections))
        h = keep("lora_h", grouped_matmul(x_, _all_a(projections_, x.dtype), sizes))
    return _grouped(x, sizes, h, projections, tuple(scalings))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped(x, sizes, h, projections, scalings):
    """The products given h; h takes no gradient: A's is computed with the rest."""
    outputs = []
    for p, s, at in zip(projections, scalings, rank_slices_of(projections), strict=True):
        low_rank = None if p.a is None else (h[:, at], (p.b * s).astype(x.dtype))
        outputs.append(grouped_matmul(x, _plain(p.weight, x.dtype), sizes, low_rank))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _forward(x, sizes, h, projections, scalings):
    return _grouped(x, sizes, h, projections, scalings), (x, sizes, h, projections)


def _backward(scalings, residuals, dy):
    x, sizes, h, projections = residuals
    dx, gradients, first = None, [], 0
    for p, s, at in zip(projections, scalings, rank_slices_of(projections), strict=True):
        n = p.weight.shape[-2]
        dy_i = dy[:, first : first + n]
        first += n
        if p.a is None:
            low_rank = None
            gradients.append(Projection(None))
        else:
            dh = grouped_matmul_transposed(dy_i, (p.b * s).astype(dy.dtype), sizes)
            low_rank = dh, p.a.astype(dy.dtype)
            db = grouped_outer(dy_i, h[:, at], sizes) * s
            gradients.append(Projection(None, grouped_outer(dh, x, sizes).astype(p.a.dtype), db.astype(p.b.dtype)))
        part = grouped_matmul_transposed(dy_i, _plain(p.weight, dy.dtype), sizes, low_rank)
        dx = part if dx is None else dx + part
    return dx, None, None, tuple(gradients)


_grouped.defvjp(_forward, _backward)


def rank_slices_of(projections: Sequence[Projection]) -> list[slice]:
    """Which columns of h are each projection's."""
    return rank_slices([p if p.a is None else p._replace(a=p.a[0]) for p in projections])


def _all_a(projections: Sequence[Projection], dtype) -> Float[Array, "E R K"]:
    return jnp.concatenate([p.a.astype(dtype) for p in projections if p.a is not None], axis=1)


def _plain(weight: NF4Array | Int8Array | Float[Array, "E N K"], dtype) -> Float[Array, "E N K"]:
    if isinstance(weight, Int8Array):
        return jax.vmap(lambda each: int8.dequantize(each, dtype))(weight)
    return dequantize_stack(weight, dtype) if isinstance(weight, NF4Array) else weight.astype(dtype)
