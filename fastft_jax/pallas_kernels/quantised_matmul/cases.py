"""Llama-3-8B's four frozen products at 1, 4, 16 and 64 rows, and one size that fits no tile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fastft_jax.pallas_kernels.case import Case
from fastft_jax.pallas_kernels.quantised_matmul import reference, triton

ROWS = (1, 4, 16, 64)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 4096))


def arg_specs(m: int, n: int, k: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """x in bfloat16 and a stack of one double-quantised weight [n, k]."""
    groups = n * k // 64
    arrays = (
        ((m, k), jnp.bfloat16),
        ((1, groups, 32), jnp.uint8),
        ((1, groups), jnp.uint8),
        ((1, -(-groups // 256)), jnp.float32),
        ((1,), jnp.float32),
    )
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays)


def draw(seed: int, *, m: int, n: int, k: int) -> tuple[np.ndarray, ...]:
    """Operands whose scales resemble those of a weight with standard deviation 0.02."""
    rng = np.random.default_rng(seed)
    groups = n * k // 64
    return (
        rng.standard_normal((m, k), np.float32).astype(jnp.bfloat16),
        rng.integers(0, 256, (1, groups, 32), dtype=np.uint8),
        rng.integers(0, 256, (1, groups), dtype=np.uint8),
        rng.uniform(0.005, 0.01, (1, -(-groups // 256))).astype(np.float32),
        np.full(1, 0.05, np.float32),
    )


def _case(m: int, n: int, k: int) -> Case:
    args = arg_specs(m, n, k)
    return Case(
        name=f"quantised_matmul/forward/{m}x{n}x{k}",
        run=functools.partial(triton.quantised_matmul, shape=(n, k)),
        reference=functools.partial(reference.quantised_matmul, shape=(n, k)),
        args=args,
        bytes=sum(a.size * a.dtype.itemsize for a in args) + 2 * m * n,
        flops=2 * m * n * k if m > 4 else 0,
        draw=functools.partial(draw, m=m, n=n, k=k),
    )


CASES: tuple[Case, ...] = (
    *(_case(m, n, k) for n, k in SHAPES for m in ROWS),
    *(_case(m, 1000, 3584) for m in (1, 3, 37)),
)
