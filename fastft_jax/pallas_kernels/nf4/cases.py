"""NF4 decoding at the sizes of an 8B model, double-quantised: to bfloat16, and to fp8 as rows and transposed."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from fastft_jax.pallas_kernels import nf4, pallas
from fastft_jax.pallas_kernels.case import Case
from fastft_jax.pallas_kernels.nf4 import reference, triton, triton_transposed

E4M3 = jnp.float8_e4m3fn


def _rows(*operands, interpret=None, shape, dtype):
    n, k = shape
    place = dict(into=None, rows=n, pitch=k // 64, row=0, blocks_a_row=k // 64)
    return triton.decode(*_stacked(operands), 0, *operands[4:], **place, dtype=dtype, interpret=interpret).reshape(n, k)


def _transposed(*operands, interpret=None, shape, dtype):
    place = dict(into=None, shape=shape, width=shape[0], column=0)
    return triton_transposed.decode(*_stacked(operands), 0, *operands[4:], **place, dtype=dtype, interpret=interpret)


def _stacked(operands):
    return [a[None] for a in operands[:4]]


def _reference(*operands, shape, dtype, transpose=False):
    w = reference.dequantize(*operands[:4], dtype, *operands[4:]).reshape(shape)
    return w.T if transpose else w


def _draw(seed: int, groups: int, scaled: bool):
    rng = np.random.default_rng(seed)
    codes, absmax = (rng.integers(0, 256, size, dtype=np.uint8) for size in ((groups, 32), (groups,)))
    scale = rng.uniform(0.01, 0.02, -(-groups // 256)).astype(np.float32)
    operands = (codes, absmax, scale, np.float32(0.03))
    return (*operands, np.float32(448 / 0.05)) if scaled else operands


def _cases(n: int, k: int) -> Iterator[Case]:
    groups = n * k // 64
    for name, run, dtype in (
        ("rows_bf16", _rows, jnp.bfloat16),
        ("rows_fp8", _rows, E4M3),
        ("t_fp8", _transposed, E4M3),
    ):
        scaled, options = dtype is E4M3, dict(shape=(n, k), dtype=dtype)
        draw = functools.partial(_draw, groups=groups, scaled=scaled)
        args = tuple(jax.ShapeDtypeStruct(shape, dtype_) for shape, dtype_ in _specs(groups, scaled))
        plain = functools.partial(_reference, **options, transpose=run is _transposed)
        moved = groups * (33 + 4 / 256) + n * k * np.dtype(dtype).itemsize + nf4.dynamic_map().nbytes
        case = Case(f"nf4_{name}/{n}x{k}", functools.partial(run, **options), plain, args, bytes=int(moved), draw=draw)
        yield dataclasses.replace(case, min_compute_capability=pallas.FP8_CAPABILITY) if scaled else case


def _specs(groups: int, scaled: bool):
    yield (groups, 32), jnp.uint8
    yield (groups,), jnp.uint8
    yield (-(-groups // 256),), jnp.float32
    yield (), jnp.float32
    if scaled:
        yield (), jnp.float32


CASES: tuple[Case, ...] = (
    *_cases(14336, 4096),
    *_cases(4096, 14336),
    *_cases(4096, 4096),
    *_cases(1024, 4096),
    *_cases(1000, 3584),
)
