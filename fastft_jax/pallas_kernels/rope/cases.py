"""Rotary embedding at the sizes of Llama 3.1 8B, Qwen3 8B, and two odd ones."""

import functools

import jax
import jax.numpy as jnp

from fastft_jax.pallas_kernels.case import Case
from fastft_jax.pallas_kernels.rms_norm.cases import memory_bound
from fastft_jax.pallas_kernels.rope import reference, triton
from fastft_jax.pallas_kernels.rope.reference import Layout


def _cases(name: str, batch: int, length: int, layout: Layout, half: int):
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((batch, length, *dims), dtype)  # noqa: E731
    n, k, h = layout[:3]
    qkv, table = shape((n + 2 * k) * h), shape(half, dtype=jnp.float32)
    norms = () if layout.eps is None else (jax.ShapeDtypeStruct((h,), jnp.bfloat16),) * 2
    size = f"{batch * length}x{n}+2*{k}x{h}"

    def forward(module, qkv, cos, sin, *norms, **options):
        return module.forward(qkv, cos, sin, norms, layout, **options)

    def backward(module, dq, dk, dv, cos, sin, *rest, **options):
        qkv, *norms = rest or [None]
        return module.backward((dq, dk, dv), cos, sin, tuple(norms), qkv, layout, **options)

    cotangents = (shape(n, h), shape(k, h), shape(k, h))
    values = 2 * batch * length * k * h if norms else 0  # of qkv, which the backward pass of the norms need not read
    for direction, op, args, unread in (
        ("forward", forward, (qkv, table, table, *norms), 0),
        ("backward", backward, (*cotangents, table, table, *([qkv, *norms] if norms else [])), values),
    ):
        run, plain = (functools.partial(op, module) for module in (triton, reference))
        yield memory_bound(f"{name}/{direction}/{size}", run, plain, *args, unread=unread)


CASES: tuple[Case, ...] = (
    *_cases("rope_qkv", 2, 4096, Layout(32, 8, 128), 64),
    *_cases("rope_qkv_norm", 2, 4096, Layout(32, 8, 128, eps=1e-6), 64),
    *_cases("rope_qkv", 1, 1000, Layout(28, 4, 128), 64),
    *_cases("rope_qkv_partial", 1, 37, Layout(32, 32, 80), 16),
)
