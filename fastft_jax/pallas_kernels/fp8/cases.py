"""Scaling rows to fp8, and products back, at the sizes of an 8B model and at odd ones."""

import functools

import jax
import jax.numpy as jnp

from fastft_jax.pallas_kernels.case import Case
from fastft_jax.pallas_kernels.fp8 import reference, triton
from fastft_jax.pallas_kernels.fp8.reference import Format


def _case(m: int, k: int, room: int = 0, format: Format = "e4m3") -> Case:
    x = jax.ShapeDtypeStruct((m, k + room), jnp.bfloat16)
    run, plain = (functools.partial(f.quantise_rows, columns=k, format=format) for f in (triton, reference))
    name = f"fp8_quantise_rows_{format}/{m}x{k}{f'+{room}' if room else ''}"
    return Case(name, run, plain, (x,), bytes=m * (k * 3 + 4))


def _rescale(m: int, n: int, r: int = 64) -> Case:
    shapes = [((m, n), jnp.bfloat16), ((m,), jnp.float32), ((m, r), jnp.bfloat16), ((n, r), jnp.bfloat16)]
    args = tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    moved = 4 * m * n + 4 * m + 2 * r * (m + n)
    return Case(f"fp8_rescale_add/{m}x{n}x{r}", triton.rescale_add, reference.rescale_add, args, bytes=moved)


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
)
