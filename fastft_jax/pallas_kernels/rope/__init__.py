"""Rotary position embedding: of one array of heads, or of a fused q, k, v projection with its norms in one kernel."""

import functools
from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.rope import reference
from fastft_jax.pallas_kernels.rope.reference import Layout, apply_rope

Implementation = Literal["xla", "triton"]

__all__ = ["Implementation", "apply_rope", "rope_qkv"]


def rope_qkv(
    qkv: Float[Array, "B T (N+2K)*H"],
    cos: Float[Array, "B T P/2"],
    sin: Float[Array, "B T P/2"],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Float[Array, "H"] | None = None,
    k_norm: Float[Array, "H"] | None = None,
    eps: float | None = None,
    plus_one: bool = False,
    train_weight: bool = False,
    stack: Float[Array, "L B T (N+2K)*H"] | None = None,
    index: Int[Array, ""] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """`rope(norm(q)), rope(norm(k)), v` of a projection whose rows are N query, K key and K value heads.

    The rotation is `apply_rope`'s: the first P of a head's H elements in halves, float32, one cast. With `q_norm` and
    `k_norm` (both or neither) every head is first normalised as `rms_norm(head, weight, eps=eps, plus_one=plus_one)`
    (Qwen3; Gemma 3 with `plus_one`). One pass over the data forward and one backward; without norms the gradient
    needs cos and sin alone, with them also qkv. Gradients of cos and sin are zero. With `stack`, qkv is also what
    `stack[index]` holds, and both passes read it there.

    The norm weights' gradients are zero unless `train_weight`, which only "xla" computes. `implementation` None picks
    "triton" on a GPU where it applies. Raises ValueError for shapes, options and names that do not fit.
    Source: Su et al. 2021, arXiv:2104.09864; Henry et al. 2020, arXiv:2010.04245 (normalised heads).
    """
    layout = Layout(num_heads, num_kv_heads, head_dim, eps, plus_one)
    norms = tuple(weight for weight in (q_norm, k_norm) if weight is not None)
    _check(qkv, cos, sin, norms, layout)
    if implementation not in (None, "xla", "triton"):
        raise ValueError(f"unknown rope implementation {implementation!r}: use None, 'xla' or 'triton'")
    if train_weight:
        if implementation == "triton":
            raise ValueError("the triton rope kernel has no gradient of the norm weights: use 'xla' or None")
        if stack is not None:
            raise ValueError("no gradient of the norm weights from a stack")
        return reference.forward(qkv, cos, sin, norms, layout)
    implementation = implementation or ("triton" if pallas.on_gpu() else "xla")
    return _rope_qkv(qkv, stack, index, cos, sin, norms, layout, implementation)


def _check(qkv, cos, sin, norms, layout: Layout) -> None:
    rows, half = layout.num_heads + 2 * layout.num_kv_heads, cos.shape[-1]
    if qkv.ndim != 3 or qkv.shape[-1] != rows * layout.head_dim:
        raise ValueError(f"{layout.num_heads} + 2 * {layout.num_kv_heads} heads do not fit qkv {qkv.shape}")
    if cos.shape != sin.shape or cos.shape[:-1] != qkv.shape[:-1] or not 0 < 2 * half <= layout.head_dim:
        raise ValueError(f"cos and sin must be {qkv.shape[:2]} and at most H/2 wide, got {cos.shape}, {sin.shape}")
    if len(norms) == 1 or any(weight.shape != (layout.head_dim,) for weight in norms):
        raise ValueError(f"q_norm and k_norm go together, [H] each, got {[weight.shape for weight in norms]}")
    if norms and layout.eps is None:
        raise ValueError("q_norm and k_norm need eps")


def _kernels(implementation: Implementation):
    if implementation == "xla":
        return reference
    from fastft_jax.pallas_kernels.rope import triton

    return triton


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _rope_qkv(qkv, stack, index, cos, sin, norms, layout, implementation):
    source = qkv if stack is None else stack
    return _kernels(implementation).forward(source, cos, sin, norms, layout, index)


def _forward(qkv, stack, index, cos, sin, norms, layout, implementation):
    source = qkv if stack is None else stack
    outputs = _rope_qkv(qkv, stack, index, cos, sin, norms, layout, implementation)
    return outputs, (cos, sin, norms, source if norms else None, index)


def _backward(layout, implementation, saved, cotangents):
    cos, sin, norms, source, index = saved
    d_qkv = _kernels(implementation).backward(cotangents, cos, sin, norms, source, layout, index)
    return d_qkv, None, None, None, None, (None,) * len(norms)


_rope_qkv.defvjp(_forward, _backward)
