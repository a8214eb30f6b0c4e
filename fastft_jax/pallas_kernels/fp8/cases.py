"""Scaling rows to fp8, and products back, at the sizes of an 8B model and at odd ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.case import Case
from fastft_jax.pallas_kernels.fp8 import glu_reference, glu_triton, norm_reference, norm_triton, reference, triton
from fastft_jax.pallas_kernels.fp8.reference import Format
from fastft_jax.pallas_kernels.rms_norm.cases import memory_bound


def _case(m: int, k: int, room: int = 0, format: Format = "e4m3") -> Case:
    x = jax.ShapeDtypeStruct((m, k + room), jnp.bfloat16)
    run, plain = (functools.partial(f.quantise_rows, columns=k, format=format) for f in (triton, reference))
    name = f"fp8_quantise_rows_{format}/{m}x{k}{f'+{room}' if room else ''}"
    least = pallas.FP8_CAPABILITY
    return Case(name, run, plain, (x,), bytes=m * (k * 3 + 4), min_compute_capability=least)


def _rescale(m: int, n: int, r: int = 64) -> Case:
    shapes = [((m, n), jnp.bfloat16), ((m,), jnp.float32), ((m, r), jnp.bfloat16), ((n, r), jnp.bfloat16)]
    args = tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    moved = 4 * m * n + 4 * m + 2 * r * (m + n)
    return Case(f"fp8_rescale_add/{m}x{n}x{r}", triton.rescale_add, reference.rescale_add, args, bytes=moved)


def _glu(m: int, f: int, r: int, activation: str = "silu"):
    """gate and up have half of the ranks each, as for a group of two adapters of one rank; r = 0: no adapters."""

    def shapes(n: int) -> list[jax.ShapeDtypeStruct]:
        low_rank = [((m, r), jnp.bfloat16), ((n, r), jnp.bfloat16)] * bool(r)
        return [jax.ShapeDtypeStruct(*s) for s in (((m, n), jnp.bfloat16), ((m,), jnp.float32), *low_rank)]

    def draw(seed: int, args: list[jax.ShapeDtypeStruct]) -> tuple[jax.Array, ...]:
        """Normal values; in the two b, zeros outside of the ranks."""
        keys = jax.random.split(jax.random.key(seed), len(args))
        values = [jax.random.normal(key, a.shape, a.dtype) for key, a in zip(keys, args, strict=True)]
        if r:
            values[3] = values[3].at[:f, r // 2 :].set(0).at[f:, : r // 2].set(0)
            values[7:] = [b.at[:, r // 2 :].set(0) for b in values[7:]]
        return tuple(values)

    gate_up, d_act, ranks = shapes(2 * f), shapes(f), ((0, r // 2), (r // 2, r))
    for name, op, args, of in (
        ("fp8_rescale_glu", "forward", gate_up, ranks),
        ("fp8_rescale_glu_backward", "backward", gate_up + d_act, (*ranks, (0, r // 2))),
    ):
        options = dict(dtype=jnp.bfloat16, activation=activation, ranks=of)
        run, plain = (functools.partial(getattr(module, op), **options) for module in (glu_triton, glu_reference))
        if op == "backward" and not r:
            run, plain = (functools.partial(_without_adapters, f) for f in (run, plain))
        case = memory_bound(f"{name}/{activation}/{m}x{f}x{r}", run, plain, *args)
        yield dataclasses.replace(case, draw=functools.partial(draw, args=args))


def _without_adapters(backward, sums, scale, d_sums, d_scale, **options):
    return backward(sums, scale, None, None, d_sums, d_scale, **options)


def _norm(m: int, d: int, room: int) -> Case:
    args = (jax.ShapeDtypeStruct((m, d), jnp.bfloat16), jax.ShapeDtypeStruct((d,), jnp.bfloat16))
    run, plain = (
        functools.partial(module.forward, eps=1e-5, plus_one=False, room=room)
        for module in (norm_triton, norm_reference)
    )
    case = memory_bound(f"fp8_rms_norm/{m}x{d}+{room}", run, plain, *args)
    return dataclasses.replace(case, min_compute_capability=pallas.FP8_CAPABILITY)


CASES: tuple[Case, ...] = (
    _case(8192, 4096, room=64),
    _case(8192, 14336, room=64),
    _case(8192, 4096),
    _case(8192, 6144),
    _case(8192, 28672),
    _case(8192, 28672, format="e5m2"),
    _case(1000, 3584),
    _case(37, 18944, room=64),
    _rescale(8192, 28672),
    _rescale(8192, 4096),
    _rescale(8192, 6144, r=128),
    _rescale(37, 3584),
    *_glu(8192, 14336, 64),
    *_glu(8192, 14336, 128),
    *_glu(8192, 14336, 64, "gelu"),
    *_glu(8192, 14336, 0),
    *_glu(37, 18944, 64),
    *_glu(1000, 3584, 64),
    _norm(8192, 4096, 64),
    _norm(8192, 4096, 0),
    _norm(8192, 8192, 64),
    _norm(1000, 3584, 64),
    _norm(37, 16384, 64),
)
