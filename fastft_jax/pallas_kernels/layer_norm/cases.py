"""LayerNorm at the sizes of an 8B model, and at an odd one."""

import functools

import jax
import jax.numpy as jnp

from fastft_jax.pallas_kernels.case import Case
from fastft_jax.pallas_kernels.layer_norm import reference, triton
from fastft_jax.pallas_kernels.rms_norm.cases import memory_bound
from fastft_jax.pallas_kernels.rms_norm.rows import MAX_TRAINED_WIDTH


def _cases(m: int, d: int):
    x, weight = jax.ShapeDtypeStruct((m, d), jnp.bfloat16), jax.ShapeDtypeStruct((d,), jnp.bfloat16)

    def case(name, op, args, **options):
        return memory_bound(
            f"layer_norm/{name}/{m}x{d}",
            functools.partial(getattr(triton, op), eps=1e-5, **options),
            functools.partial(getattr(reference, op), eps=1e-5, **options),
            *args,
        )

    yield case("forward", "forward", (x, weight, weight), room=0)
    yield case("forward_room", "forward", (x, weight, weight), room=64)
    yield case("backward", "backward", (x, x, weight), train_weight=False)
    if d <= MAX_TRAINED_WIDTH:
        yield case("backward_weight", "backward", (x, x, weight), train_weight=True)


CASES: tuple[Case, ...] = (*_cases(8192, 4096), *_cases(8192, 8192), *_cases(1000, 3584), *_cases(37, 16384))
