"""Grouped products at the sizes of Mixtral 8x7B's experts and of their adapters, and at odd ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fastft_jax.pallas_kernels.case import Case
from fastft_jax.pallas_kernels.grouped_matmul import reference, triton


def _draw(seed: int, args: tuple[jax.ShapeDtypeStruct, ...]) -> tuple:
    """Normal factors, and uneven groups, one of them empty."""
    rng = np.random.default_rng(seed)
    *factors, sizes = args
    shares = rng.random(sizes.shape[0]) ** 2
    shares[sizes.shape[0] // 2] = 0.0
    cuts = np.round(np.cumsum(shares) / shares.sum() * factors[0].shape[0]).astype(np.int32)
    values = [jnp.asarray(rng.standard_normal(f.shape, np.float32), f.dtype) for f in factors]
    return *values, jnp.asarray(np.diff(cuts, prepend=0), jnp.int32)


def _cases(m: int, e: int, n: int, k: int, r: int = 0, dtype=jnp.bfloat16, hopper: bool = False):
    """With r, the first two have a low-rank pair of that rank; `hopper`: they alone, with the tiles for it."""
    x, y = jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((m, n), dtype)
    w, sizes = jax.ShapeDtypeStruct((e, n, k), dtype), jax.ShapeDtypeStruct((e,), jnp.int32)
    h = jax.ShapeDtypeStruct((m, r), dtype)
    b, a = jax.ShapeDtypeStruct((e, n, r), dtype), jax.ShapeDtypeStruct((e, r, k), dtype)
    for name, factors in (
        ("matmul", (x, w, h, b) if r else (x, w)),
        ("transposed", (y, w, h, a) if r else (y, w)),
        ("outer", (y, x)),
    ):
        args, tile, least = (*factors, sizes), {}, {}
        if hopper:
            if name == "outer":
                continue
            columns, depth = (n, k) if name == "matmul" else (k, n)
            tile = {"tile": triton.choose_tile(columns, depth, dtype, (9, 0))}
            least = {"min_compute_capability": (9, 0)}
        yield Case(
            name=f"grouped_{name}{'_hopper' if hopper else ''}/{e}x{n}x{k}/{m}{f'/{r}' if len(factors) > 2 else ''}",
            run=functools.partial(_run, getattr(triton, name), **tile),
            reference=functools.partial(_run, getattr(reference, name)),
            args=args,
            bytes=np.dtype(dtype).itemsize * (m * (n + k) + e * n * k),
            flops=2 * m * (n * k + (r * (n if name == "matmul" else k) if len(factors) > 2 else 0)),
            draw=functools.partial(_draw, args=args),
            **least,
        )


def _run(function, lhs, rhs, *rest, **options):
    *low_rank, sizes = rest
    return function(lhs, rhs, sizes, *([tuple(low_rank)] if low_rank else []), **options)


CASES: tuple[Case, ...] = (
    *_cases(16384, 8, 28672, 4096, 32, hopper=True),
    *_cases(16384, 8, 14336, 4096, 32),
    *_cases(16384, 8, 32, 4096),
    *_cases(16384, 8, 4096, 32),
    *_cases(300, 3, 500, 512, 12, hopper=True),
    *_cases(300, 14, 72, 200, 12),  # more tiles of rows than a band has
    *_cases(150, 4, 40, 24, dtype=jnp.float32),
)
