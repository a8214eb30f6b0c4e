"""Gated linear units between fp8 products: they read the products' bare sums and finish them on the way.

A product's value is sums * scale + h b^T (`rescale_add`): that of [gate | up], or of the activation's cotangent. To
finish it here spares writing and reading it: 1.4 GB a layer of an 8B model at 8192 tokens, both directions together.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.fp8 import glu_reference
from fastft_jax.pallas_kernels.glu.reference import ACTIVATIONS, Activation

Implementation = Literal["xla", "triton"]
Ranks = tuple[tuple[int, int], ...]


class Scaled(NamedTuple):
    """A product to be finished: sums * scale + h b^T; without h and b, sums * scale."""

    sums: Float[Array, "M N"]  # or a stack of such, [L, M, N], where an index says which
    scale: Float[Array, "M"]
    h: Float[Array, "M R"] | None = None
    b: Float[Array, "N R"] | None = None


def rescale_glu(
    gate_up: Scaled,
    *,
    dtype: jax.typing.DTypeLike,
    activation: Activation = "silu",
    ranks: Ranks | None = None,
    index: Int[Array, ""] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "M F"]:
    """`glu` of the finished [gate | up], which is rounded to `dtype` as if it had been written: act(gate) * up.

    With `index`, gate_up.sums is a stack, of which that one is read where it lies. `ranks` are the columns of h and b
    where b may differ from zero, (start, stop) for gate and for up; None: all of them. scale is float32, h and b are of
    `dtype`. Not differentiable. `None` picks "triton" on a GPU for 16-bit dtypes, else "xla". Raises
    ValueError for shapes, dtypes and names that do not fit.
    """
    kernels, gate_up, index = _prepared(gate_up, dtype, activation, index, implementation)
    ranks = _ranks(ranks, gate_up, gate_up)
    return kernels.forward(*gate_up, dtype=dtype, activation=activation, ranks=ranks, index=index)


def rescale_glu_backward(
    gate_up: Scaled,
    d_act: Scaled,
    *,
    dtype: jax.typing.DTypeLike,
    activation: Activation = "silu",
    ranks: Ranks | None = None,
    index: Int[Array, ""] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "M 2F"], Float[Array, "M F"]]:
    """The cotangent of the finished [gate | up] from the finished d_act, and `rescale_glu(gate_up)` again: one pass.

    As `glu_backward` computes them. `ranks` has a third entry here, for d_act. Raises ValueError as `rescale_glu` does.
    """
    _check(d_act, d_act.sums.shape, dtype)
    kernels, gate_up, index = _prepared(gate_up, dtype, activation, index, implementation)
    if d_act.sums.shape != (gate_up.sums.shape[-2], gate_up.sums.shape[-1] // 2):
        raise ValueError(f"d_act {d_act.sums.shape} does not fit gate_up {gate_up.sums.shape}")
    ranks = _ranks(ranks, gate_up, gate_up, d_act)
    options = dict(dtype=dtype, activation=activation, ranks=ranks, index=index)
    if kernels is not glu_reference:
        options["in_place"] = True
    return kernels.backward(*gate_up, *d_act, **options)


def _prepared(gate_up: Scaled, dtype, activation, index, implementation):
    """The module that computes it, gate_up and index as that takes them: only the kernels read a stack in place."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")
    if implementation not in (None, "xla", "triton"):
        raise ValueError(f"unknown fp8 implementation {implementation!r}: use None, 'xla' or 'triton'")
    shape = gate_up.sums.shape[0 if index is None else 1 :]
    _check(gate_up, shape, dtype)
    if shape[1] % 2:
        raise ValueError(f"gate_up must be [M, 2F], got {shape}")
    if implementation is None:
        implementation = "triton" if pallas.on_gpu() and jnp.dtype(dtype).itemsize <= 2 else "xla"
    if implementation == "xla":
        if index is not None:
            gate_up = gate_up._replace(sums=jax.lax.dynamic_index_in_dim(gate_up.sums, index, keepdims=False))
        return glu_reference, gate_up, None
    from fastft_jax.pallas_kernels.fp8 import glu_triton

    return glu_triton, gate_up, index


def _check(product: Scaled, shape, dtype) -> None:
    _, scale, h, b = product
    fits = len(shape) == 2 and scale.shape == shape[:1] and (h is None) == (b is None)
    if fits and h is not None:
        fits = (h.shape, b.shape) == ((shape[0], h.shape[-1]), (shape[1], h.shape[-1])) and h.dtype == b.dtype == dtype
    if not fits:
        low_rank = "" if h is None or b is None else f" and {h.dtype}{h.shape} times {b.dtype}{b.shape}"
        raise ValueError(
            f"cannot finish sums of shape {shape} in {jnp.dtype(dtype)} with scale {scale.shape}{low_rank}"
        )


def _ranks(ranks: Ranks | None, *products: Scaled) -> Ranks:
    if ranks is not None and len(ranks) != len(products):
        raise ValueError(f"need (start, stop) of {len(products)} products, got {ranks}")
    return ranks or tuple((0, 0 if p.h is None else p.h.shape[1]) for p in products)
